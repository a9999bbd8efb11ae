"""Drops documents that a classifier scores low; what it looks for is what it was trained on.

FineWeb-Edu (arXiv 2406.17557, section 4) and DCLM (arXiv 2406.11794, section 4.4) keep web pages
this way. A model is trained here from two JSONL files, or is a fastText classifier of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equilibrium_mcore.config.filters import EducationalConfig
from equilibrium_mcore.corpus.filters.base import DocumentFilter, Dropped
from equilibrium_mcore.corpus.filters.fasttext_model import LABEL_PREFIX, FastTextModel
from equilibrium_mcore.corpus.filters.linear_classifier import MADE_BY, LinearClassifier
from equilibrium_mcore.corpus.filters.optional import require_file

OWN_ENDING = ".safetensors"
FASTTEXT_ENDINGS = (".bin", ".ftz")


class EducationalFilter(DocumentFilter):
    """Keeps a document whose score is at least `min_score`."""

    name = "educational"

    def __init__(self, config: EducationalConfig) -> None:
        """Raises FileNotFoundError, MissingLibraryError, and ValueError for another kind of file"""
        advice = f"train one with {MADE_BY}, or give a fastText classifier"
        path = require_file(config.model, wanted_by=self.name, key="model", advice=advice)
        if path.suffix == OWN_ENDING:
            self.score = LinearClassifier.load(path).score
        elif path.suffix in FASTTEXT_ENDINGS:
            model = FastTextModel(path, wanted_by=self.name, advice=advice)
            label = config.positive_label.removeprefix(LABEL_PREFIX)
            if label not in model.labels:
                raise ValueError(
                    f"filter educational: positive_label={config.positive_label!r} is no label of "
                    f"{path}; it has {', '.join(sorted(model.labels))}"
                )
            self.score = lambda text: model.probabilities(text, best=-1).get(label, 0.0)
        else:
            raise ValueError(
                f"filter educational: model={path} ends in {path.suffix!r}: must be {OWN_ENDING} "
                f"({MADE_BY}) or one of fastText's, {', '.join(FASTTEXT_ENDINGS)}"
            )
        self._least = config.min_score
        self._low = Dropped(f"score below {config.min_score:g}")

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        if not text.strip():
            return Dropped("no text")
        return text if self.score(text) >= self._least else self._low

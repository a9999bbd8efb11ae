"""Keeps documents in the languages that are wanted.

py3langid ships its model of 140 languages (4.5 MB) with its package and needs no network. A
fastText model, such as lid.176.bin, has to be downloaded by the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equilibrium_mcore.config.filters import LanguageConfig
from equilibrium_mcore.corpus.filters.base import DocumentFilter, Dropped
from equilibrium_mcore.corpus.filters.fasttext_model import FastTextModel
from equilibrium_mcore.corpus.filters.optional import require

PIECES = 8  # of a document that is longer than what is looked at


class LanguageFilter(DocumentFilter):
    """Keeps a document whose most likely language is wanted, and likely enough."""

    name = "language"

    def __init__(self, config: LanguageConfig) -> None:
        """Raises MissingLibraryError, FileNotFoundError, and ValueError for unknown languages."""
        self._config = config
        if config.library == "fasttext":
            advice = "download lid.176.bin from fastText's site, or use library: py3langid"
            model = FastTextModel(config.model, wanted_by=self.name, advice=advice)
            known = {_two_letters(label) for label in model.labels}
            self._classify = lambda text: _best(model.probabilities(text))
        else:
            langid = require("py3langid.langid", wanted_by=self.name)
            identifier = langid.LanguageIdentifier.from_model_file(
                langid.MODEL_FILE, norm_probs=True
            )
            known = set(identifier.labels)
            self._classify = identifier.classify
        unknown = [code for code in config.languages if code not in known]
        if unknown:
            raise ValueError(
                f"filter language: languages={unknown}: not known to {config.library}; it knows "
                f"{', '.join(sorted(known))}"
            )
        self._wanted = frozenset(config.languages)

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        if not text.strip():
            return Dropped("no text")
        language, confidence = self._classify(sample(text, self._config.max_characters))
        if language not in self._wanted:
            return Dropped(f"language {language}")
        if confidence < self._config.min_confidence:
            return Dropped(f"less than {self._config.min_confidence:g} sure of its language")
        return text


def sample(text: str, limit: int) -> str:
    """`text`, or evenly spaced pieces of it with about `limit` characters in all."""
    if len(text) <= limit:
        return text
    length = max(limit // PIECES, 1)
    last = len(text) - length
    starts = [round(last * number / (PIECES - 1)) for number in range(PIECES)]
    return " ".join(text[start : start + length] for start in starts)


def _best(probabilities: Mapping[str, float]) -> tuple[str, float]:
    label, probability = next(iter(probabilities.items()), ("unknown", 0.0))
    return _two_letters(label), probability


def _two_letters(label: str) -> str:
    """`eng_Latn`, as newer models say, to `eng`; `en` stays."""
    return label.split("_")[0]

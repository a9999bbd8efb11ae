"""Perplexity as a filter: under our own n-grams of characters, or a KenLM model of the user's.

KenLM has no wheels and is compiled when it is installed, so nothing here depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from equilibrium_mcore.config.filters import PerplexityConfig
from equilibrium_mcore.corpus.filters.base import DocumentFilter, Dropped
from equilibrium_mcore.corpus.filters.character_ngrams import MADE_BY, CharacterNgrams
from equilibrium_mcore.corpus.filters.optional import require, require_file

OWN_ENDING = ".safetensors"
KENLM_ENDINGS = (".arpa", ".bin", ".binary", ".klm")
KENLM_INSTALL = "pip install kenlm (it is compiled: a C++ compiler and CMake are needed)"


class PerplexityFilter(DocumentFilter):
    """Drops a document whose perplexity is outside of the bounds."""

    name = "perplexity"

    def __init__(self, config: PerplexityConfig) -> None:
        """Raises FileNotFoundError, MissingLibraryError, and ValueError for another kind of file"""
        advice = f"train one with {MADE_BY}, or give a KenLM model"
        path = require_file(config.model, wanted_by=self.name, key="model", advice=advice)
        if path.suffix == OWN_ENDING:
            self.perplexity = CharacterNgrams.load(path).perplexity
        elif path.suffix in KENLM_ENDINGS:
            self.perplexity = _kenlm(config)
        else:
            raise ValueError(
                f"filter perplexity: model={path} ends in {path.suffix!r}: must be {OWN_ENDING} "
                f"({MADE_BY}) or one of KenLM's, {', '.join(KENLM_ENDINGS)}"
            )
        least, most = config.min_perplexity, config.max_perplexity
        self._least = 0.0 if least is None else least
        self._most = math.inf if most is None else most
        self._low, self._high = (
            Dropped(f"perplexity below {self._least:g}"),
            Dropped(f"perplexity above {self._most:g}"),
        )

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        if not text.strip():
            return Dropped("no text")
        value = self.perplexity(text)
        if value < self._least:
            return self._low
        return self._high if value > self._most else text


def _kenlm(config: PerplexityConfig) -> Callable[[str], float]:
    """Perplexity per token as CCNet computes it, or per white-space word of the plain text."""
    kenlm = require("kenlm", wanted_by="perplexity", install=KENLM_INSTALL)
    try:
        model = kenlm.Model(str(config.model))
    except OSError as error:
        raise ValueError(
            f"filter perplexity: model={config.model} cannot be read by KenLM ({error})"
        ) from None
    if config.sentencepiece_model is None:
        return lambda text: _per_token(model, [" ".join(s.split()) for s in text.splitlines()])
    pieces = require_file(
        config.sentencepiece_model,
        wanted_by="perplexity",
        key="sentencepiece_model",
        advice="it comes with the KenLM model (NAME.sp.model)",
    )
    ccnet = require("datatrove.utils.perplexity", wanted_by="perplexity")
    processor = require("sentencepiece", wanted_by="perplexity").SentencePieceProcessor()
    processor.load(str(pieces))
    # Its normalization alone: its own loading of models downloads them.
    normalize = ccnet.KenlmModel("", "").normalize
    return lambda text: _per_token(
        model, [" ".join(processor.encode_as_pieces(s)) for s in normalize(text).split("\n")]
    )


def _per_token(model: Any, sentences: list[str]) -> float:
    """10^(-score / tokens), each sentence's end a token too."""
    tokens = sum(len(sentence.split()) + 1 for sentence in sentences)
    return 10.0 ** (-sum(map(model.score, sentences)) / max(tokens, 1))

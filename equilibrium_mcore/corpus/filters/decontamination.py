"""Decontamination: documents that share a long run of words with an evaluation set go.

Texts lose first what `ignore` names, are cut into words, and are compared by hashes of n-grams;
GPT-3, arXiv 2005.14165, appendix C, took n = 13. A reference with fewer words is looked for as a
whole, down to `min_words`. Memory: 11 to 27 bytes for each n-gram of the references, in every
worker.

datatrove's own decontamination wants an index that lighteval makes from tasks that it downloads;
here the references are files that the user has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.config.filters import DecontaminationConfig
from equilibrium_mcore.corpus.filters.base import DocumentFilter, Dropped
from equilibrium_mcore.corpus.filters.comparable import comparable_words
from equilibrium_mcore.corpus.filters.hash_set import HashSet64
from equilibrium_mcore.corpus.filters.ngram_hashes import hash_ngrams, hash_words
from equilibrium_mcore.corpus.filters.optional import require_file
from equilibrium_mcore.data.jsonl import read_texts


class DecontaminationFilter(DocumentFilter):
    """Drops a document that holds `min_matches` n-grams of one reference file."""

    name = "decontamination"

    def __init__(self, config: DecontaminationConfig) -> None:
        """Read the references.

        Raises FileNotFoundError, and ValueError for a line without text, a file without any n-gram
        to look for; MissingLibraryError when datatrove is missing.
        """
        self._min_matches, self._ignore = config.min_matches, config.ignore
        self._sets: dict[Path, dict[int, HashSet64]] = {}
        self._notes: list[str] = []
        for path in config.references:
            self._read(path, config)

    def _read(self, path: Path, config: DecontaminationConfig) -> None:
        by_length: dict[int, list[np.ndarray]] = defaultdict(list)
        too_short = count = 0
        require_file(path, wanted_by=self.name, key="references", advice="give an existing JSONL")
        for text in read_texts(path, config.fields):
            count += 1
            words = self._hashed_words(text)
            n = min(config.ngram_words, words.size)
            if n < config.min_words:
                too_short += 1
            else:
                by_length[n].append(hash_ngrams(words, n))
        if not by_length:
            raise ValueError(
                f"filter decontamination: references: {path} holds no text of at least "
                f"min_words={config.min_words} words under {', '.join(config.fields)}; name its "
                "fields, or lower min_words"
            )
        if too_short:
            self._notes.append(
                f"{path}: {too_short:,} of {count:,} references have fewer than "
                f"min_words={config.min_words} words and are not looked for"
            )
        self._sets[path] = {n: _set_of(found) for n, found in sorted(by_length.items())}

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        words = self._hashed_words(text)
        ngrams: dict[int, np.ndarray] = {}
        for path, sets in self._sets.items():
            matches = 0
            for n, known in sets.items():
                if n not in ngrams:
                    ngrams[n] = np.unique(hash_ngrams(words, n))
                found = int(np.count_nonzero(known.contains(ngrams[n])))
                matches += found
            if matches >= self._min_matches:
                return Dropped(f"found in {path.name}")
        return text

    def notes(self) -> list[str]:
        """See DocumentFilter: how many references of a file are too short to be looked for."""
        return list(self._notes)

    def _hashed_words(self, text: str) -> np.ndarray:
        return hash_words(comparable_words(text, self._ignore, wanted_by=self.name))


def _set_of(ngrams: list[np.ndarray]) -> HashSet64:
    known = HashSet64()
    known.add(np.concatenate(ngrams))
    return known

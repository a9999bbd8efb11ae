"""Deduplication: exact, MinHash and SimHash. The first document in reading order stays.

A document is compared with those that stayed, not with those that went: so a chain of small changes
does not carry off what differs from everything kept. Memory grows with the documents that stay, in
one process: 11 to 27 bytes for each with `exact`, `bands` times as much with `minhash`, about 9
times (`max_distance_bits` + 1) with `simhash`. Two different texts with one 64-bit hash are taken
for the same: among a billion documents the chance that any pair is hit is 3 in 100.
"""

from __future__ import annotations

from array import array
from collections import defaultdict

import numpy as np

from equilibrium_mcore.config.filters import DeduplicationConfig
from equilibrium_mcore.corpus.filters.base import CorpusFilter, SeenIndex
from equilibrium_mcore.corpus.filters.comparable import (
    comparable,
    comparable_words,
    normalization,
)
from equilibrium_mcore.corpus.filters.hash_set import HashSet64
from equilibrium_mcore.corpus.filters.ngram_hashes import hash_ngrams, hash_text, hash_words, mix
from equilibrium_mcore.corpus.filters.optional import require

NAME = "deduplication"
MINHASH_CHUNK = 4096  # shingles whose hashes are in memory at once
FINGERPRINT_BITS = 64


class EqualHashes(SeenIndex):
    """A document goes when one of its hashes is that of a document that stayed."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._seen = HashSet64()

    def decide(self, signature: np.ndarray) -> str | None:
        """See SeenIndex."""
        if self._seen.contains(signature).any():
            return self._reason
        self._seen.add(signature)
        return None


class ExactDeduplication(CorpusFilter):
    """Same text, after the normalization that was asked for."""

    name = NAME
    signature_size = 1

    def __init__(self, config: DeduplicationConfig) -> None:
        self._normalize, self._ignore = config.normalize, config.ignore
        if config.normalize == "simplified":
            comparable("", config.ignore, wanted_by=NAME)  # a missing library is reported now

    def signature(self, text: str) -> np.ndarray:
        """See CorpusFilter."""
        if self._normalize == "whitespace":
            text = " ".join(text.split())
        elif self._normalize == "simplified":
            text = comparable(text, self._ignore, wanted_by=NAME)
        return np.array([hash_text(text)], np.uint64)

    def start(self) -> SeenIndex:
        """See CorpusFilter."""
        return EqualHashes("same text as an earlier document")


class MinHashDeduplication(CorpusFilter):
    """MinHash over word n-grams with banding; the hashes are datatrove's, as FineWeb used them.

    Two documents whose sets of n-grams have Jaccard similarity s share a band with probability
    1 - (1 - s^rows)^bands. Broder 1997; FineWeb, arXiv 2406.17557, section 3.4.
    """

    name = NAME

    def __init__(self, config: DeduplicationConfig) -> None:
        """Raises MissingLibraryError when datatrove is missing."""
        minhash = require("datatrove.pipeline.dedup.minhash", wanted_by=NAME)
        hashing = require("datatrove.utils.hashing", wanted_by=NAME)
        words = require("equilibrium_mcore.corpus.filters.words", wanted_by=NAME)
        self.signature_size = config.bands
        self._ignore = config.ignore
        self._band_numbers = mix(np.arange(1, config.bands + 1, dtype=np.uint64))
        self._step = minhash.MinhashDedupSignature(
            output_folder=".",  # nothing is written: only the step's functions are used
            config=minhash.MinhashConfig(
                n_grams=config.shingle_words,
                num_buckets=config.bands,
                hashes_per_bucket=config.rows,
                seed=config.seed,
                norm_config=normalization(frozenset(config.ignore), NAME),
                hash_config=hashing.HashConfig(precision=64, hash_fc="sha1"),
            ),
            language=words.WORDS_BY_SCRIPT,
        )

    def signature(self, text: str) -> np.ndarray:
        """See CorpusFilter. A text with fewer words than an n-gram is one n-gram."""
        # Half of a surrogate pair cannot be encoded, which datatrove's hashes are made from.
        text = text.encode("utf-8", "replace").decode("utf-8")
        shingles = self._step.get_shingles(text)
        if not len(shingles):
            whole = hash_text(comparable(text, self._ignore, wanted_by=NAME))
            shingles = np.array([[whole]], np.uint64)
        chunks = range(0, len(shingles), MINHASH_CHUNK)
        smallest = np.min(
            [self._step.get_signature(shingles[i : i + MINHASH_CHUNK]) for i in chunks], axis=0
        ).astype(np.uint64)  # [bands, rows]
        total = self._band_numbers.copy()  # so that equal rows of two bands do not meet
        for row in smallest.T:
            total = mix(total ^ row)
        return total

    def start(self) -> SeenIndex:
        """See CorpusFilter."""
        return EqualHashes("near duplicate of an earlier document")


class SimHashDeduplication(CorpusFilter):
    """64-bit fingerprints of word n-grams that differ in few bits. Manku, Jain, Das Sarma 2007.

    Less exact than MinHash: docs/reference/filters.md has both, measured.
    """

    name = NAME
    signature_size = 1

    def __init__(self, config: DeduplicationConfig) -> None:
        """Raises MissingLibraryError when datatrove is missing."""
        self._words = config.simhash_words
        self._distance = config.max_distance_bits
        self._ignore = config.ignore
        comparable("", config.ignore, wanted_by=NAME)  # a missing library is reported now

    def signature(self, text: str) -> np.ndarray:
        """See CorpusFilter."""
        words = comparable_words(text, self._ignore, wanted_by=NAME)
        ngrams = hash_ngrams(hash_words(words), min(self._words, max(len(words), 1)))
        bits = np.unpackbits(ngrams.view(np.uint8).reshape(-1, 8), axis=1)
        majority = 2 * bits.sum(axis=0, dtype=np.int64) > len(ngrams)
        return np.packbits(majority).view(np.uint64)

    def start(self) -> SeenIndex:
        """See CorpusFilter."""
        return NearFingerprints(self._distance)


class NearFingerprints(SeenIndex):
    """A document goes when a fingerprint that stayed differs in at most `distance` bits.

    Cut into distance + 1 blocks, two such fingerprints agree in one block at least: only those
    are compared.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        edges = np.linspace(0, FINGERPRINT_BITS, distance + 2).astype(int).tolist()
        self._blocks = [
            (start, (1 << (end - start)) - 1)
            for start, end in zip(edges[:-1], edges[1:], strict=True)
        ]
        self._seen: list[dict[int, array]] = [defaultdict(_uint64s) for _ in self._blocks]

    def decide(self, signature: np.ndarray) -> str | None:
        """See SeenIndex."""
        fingerprint = int(signature[0])
        shelves = [
            seen[fingerprint >> start & mask]
            for seen, (start, mask) in zip(self._seen, self._blocks, strict=True)
        ]
        for shelf in shelves:
            others = np.frombuffer(shelf, np.uint64)
            if others.size and np.bitwise_count(others ^ signature[0]).min() <= self._distance:
                return "near duplicate of an earlier document"
        del others  # an array that is looked at cannot grow
        for shelf in shelves:
            shelf.append(fingerprint)
        return None


def _uint64s() -> array:
    return array("Q")


_METHODS = {
    "exact": ExactDeduplication,
    "minhash": MinHashDeduplication,
    "simhash": SimHashDeduplication,
}


def deduplication_filter(config: DeduplicationConfig) -> CorpusFilter:
    """The filter of the method that was asked for."""
    return _METHODS[config.method](config)

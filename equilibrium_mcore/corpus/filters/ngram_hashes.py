"""64-bit hashes of texts and of their word n-grams, the same on every machine and in every run."""

from __future__ import annotations

import hashlib

import numpy as np

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the product loses nothing
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def hash_text(text: str) -> int:
    """64 bits of BLAKE2b. Half of a surrogate pair, which is no text, is hashed as it stands."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_words(words: list[str]) -> np.ndarray:
    """A hash of each word: uint64 [len(words)]."""
    known = {word: hash_text(word) for word in set(words)}
    return np.fromiter((known[word] for word in words), np.uint64, count=len(words))


def hash_ngrams(word_hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of each n words in a row: uint64 [max(words - n + 1, 0)]."""
    count = word_hashes.size - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = total * _FACTOR + word_hashes[offset : offset + count]
    return mix(total)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread the bits of uint64 values over all 64 (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))

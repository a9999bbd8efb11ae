"""Perplexity per character under an n-gram model of characters, trained from a text file.

Characters need no tokenizer and suit any language; five of them see spelling and common words.
Probabilities are interpolated down to the uniform one (Witten and Bell, 1991), as in data/entropy:

    p_k(c | h) = (count(h c) + types(h) * p_(k-1)(c | h')) / (count(h) + types(h))

with h the k - 1 characters before c, h' without its first, types(h) how many characters follow h,
and p_0 = 1 / CHARACTERS. An unseen h leaves p_(k-1). N-grams are kept as sorted 64-bit hashes, 12
to 28 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.corpus.filters.model_file import load_model, save_model
from equilibrium_mcore.corpus.filters.ngram_hashes import hash_ngrams, mix

KIND = "character n-grams"
MADE_BY = command("perplexity-model")
CHARACTERS = 1 << 14  # what an unseen character is spread over
LARGEST_ORDER = 8
BATCH_CHARACTERS = 1 << 20  # counted at once
PIECE_CHARACTERS = 1 << 18  # of a document, judged at once


@dataclass(frozen=True)
class Level:
    """N-grams of one length k, by sorted hash, and the k - 1 characters before their last."""

    grams: np.ndarray  # uint64 [grams]
    counts: np.ndarray  # uint32 [grams]
    pasts: np.ndarray  # uint64 [pasts]
    totals: np.ndarray  # uint32 [pasts]: how often something followed
    types: np.ndarray  # uint32 [pasts]: how many different characters followed


class CharacterNgrams:
    """A trained model; `levels[k - 1]` has the n-grams of k characters."""

    def __init__(self, levels: list[Level]) -> None:
        self.levels = levels

    def log_probabilities(self, text: str) -> np.ndarray:
        """Natural logarithm of each character's probability, float64 [len(text)]."""
        codes = _codes(text)
        probability = np.full(codes.size, 1 / CHARACTERS)
        for k, level in enumerate(self.levels, start=1):
            grams, pasts = _grams_and_pasts(codes, k)
            if not grams.size:
                break
            count = _look_up(level.grams, grams, level.counts)
            total = _look_up(level.pasts, pasts, level.totals)
            types = _look_up(level.pasts, pasts, level.types)
            lower = probability[k - 1 :]  # the first k - 1 characters have a shorter past
            better = (count + types * lower) / np.maximum(total + types, 1)
            probability[k - 1 :] = np.where(total > 0, better, lower)
        return np.log(probability)

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log-probability of a character; infinite for no text."""
        if not text:
            return float("inf")
        total, reach = 0.0, len(self.levels) - 1  # characters that a probability looks back
        for start in range(0, len(text), PIECE_CHARACTERS):  # so that memory stays small
            first = max(start - reach, 0)
            found = self.log_probabilities(text[first : start + PIECE_CHARACTERS])
            total += float(found[start - first :].sum())
        return float(np.exp(-total / len(text)))

    def save(self, path: Path, **notes: object) -> None:
        """Write the model; `notes` are kept with it."""
        arrays = {
            f"{k}.{field.name}": getattr(level, field.name)
            for k, level in enumerate(self.levels, start=1)
            for field in fields(Level)
        }
        save_model(path, kind=KIND, settings={"order": len(self.levels), **notes}, arrays=arrays)

    @classmethod
    def load(cls, path: Path) -> CharacterNgrams:
        """Read a model. Raises ValueError when the file is not one."""
        settings, arrays = load_model(path, kind=KIND, made_by=MADE_BY)
        names = [field.name for field in fields(Level)]
        orders = range(1, settings["order"] + 1)
        return cls([Level(**{name: arrays[f"{k}.{name}"] for name in names}) for k in orders])


def train_character_ngrams(texts: Iterable[str], *, order: int) -> CharacterNgrams:
    """Count n-grams of up to `order` characters.

    Raises ValueError for an order out of range, or when there is no text.
    """
    if not 1 <= order <= LARGEST_ORDER:
        raise ValueError(f"order {order}: must be 1 to {LARGEST_ORDER}")
    counted: list[_Counted] = [_Counted() for _ in range(order)]
    for text in texts:
        codes = _codes(text)
        for k, level in enumerate(counted, start=1):
            level.add(*_grams_and_pasts(codes, k))
    levels = [level.finish() for level in counted]
    if not levels[0].grams.size:
        raise ValueError("there is no text to train a perplexity model from")
    return CharacterNgrams(levels)


class _Counted:
    """Sums up the n-grams of one length, in batches so that memory follows the different ones."""

    def __init__(self) -> None:
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0
        self._grams, self._pasts = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._counts = np.empty(0, np.int64)

    def add(self, grams: np.ndarray, pasts: np.ndarray) -> None:
        self._waiting.append((grams, pasts))
        self._size += grams.size
        if self._size >= BATCH_CHARACTERS:
            self._merge()

    def _merge(self) -> None:
        grams = np.concatenate([self._grams, *(grams for grams, _ in self._waiting)])
        pasts = np.concatenate([self._pasts, *(pasts for _, pasts in self._waiting)])
        counts = np.ones(grams.size, np.int64)
        counts[: self._counts.size] = self._counts
        self._grams, first, place = np.unique(grams, return_index=True, return_inverse=True)
        self._pasts = pasts[first]
        self._counts = np.bincount(place, counts, minlength=first.size).astype(np.int64)
        self._waiting, self._size = [], 0

    def finish(self) -> Level:
        self._merge()
        pasts, place = np.unique(self._pasts, return_inverse=True)
        totals = np.bincount(place, self._counts, minlength=pasts.size)
        types = np.bincount(place, minlength=pasts.size)
        values = [array.astype(np.uint32) for array in (self._counts, totals, types)]
        return Level(self._grams, values[0], pasts, values[1], values[2])


def _codes(text: str) -> np.ndarray:
    """A hash of each character, uint64 [len(text)]."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return mix(points.astype(np.uint64) + np.uint64(1))


def _grams_and_pasts(codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of each k characters in a row, and of the first k - 1 of them; both [len - k + 1]."""
    grams = hash_ngrams(codes, k)
    return grams, hash_ngrams(codes[: max(codes.size - 1, 0)], k - 1) if k > 1 else grams * 0


def _look_up(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each hash, 0 for one that is not there: float64 [wanted]."""
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(np.float64)

"""Which documents are taken, in flat memory: cuts through an order that is never sorted.

An order is a 64-bit key per document, smaller first, ties in reading order. A cut takes documents
from the front until they weigh `target`. It is found by counting weights in 65,536 bins of the
key's top 16 bits, then in the bin where the target falls, and so on: four passes over the keys,
whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

BINS = 1 << 16
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

Weighted = Iterable[tuple[np.ndarray, np.ndarray]]
"""Pairs of keys (uint64) and weights (integer), in reading order."""


@dataclass(frozen=True)
class Cut:
    """Keys below `threshold` are in; keys equal to it, while they weigh less than `room` so far."""

    threshold: int
    room: int


def find_cut(passes: Callable[[], Weighted], target: int) -> Cut | None:
    """The cut at which the documents in front weigh `target` or just more; None: all are needed.

    `passes()` is called up to four times and gives the same keys and weights each time.
    """
    if target <= 0:
        return Cut(0, 0)
    prefix, below = 0, 0
    for shift in (48, 32, 16, 0):
        histogram = np.zeros(BINS, np.int64)
        for keys, weights in passes():
            if shift < 48:
                inside = (keys >> np.uint64(shift + 16)) == np.uint64(prefix)
                keys, weights = keys[inside], weights[inside]
            bins = ((keys >> np.uint64(shift)) & np.uint64(BINS - 1)).astype(np.int64)
            np.add.at(histogram, bins, weights.astype(np.int64))
        sums = below + np.cumsum(histogram)
        if sums[-1] < target:
            return None
        place = int(np.searchsorted(sums, target))
        below = int(sums[place - 1]) if place else below
        prefix = prefix << 16 | place
    return Cut(prefix, target - below)


class CutReader:
    """Says of keys in reading order which are in front of a cut; None takes all."""

    def __init__(self, cut: Cut | None) -> None:
        self._cut = cut
        self._used = 0

    def take(self, keys: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Boolean [keys]; to be called with each block once, in order."""
        if self._cut is None:
            return np.ones(keys.size, bool)
        threshold = np.uint64(self._cut.threshold)
        taken, ties = keys < threshold, keys == threshold
        if ties.any() and self._used < self._cut.room:
            tied = weights[ties].astype(np.int64)
            before = self._used + np.cumsum(tied) - tied
            taken[ties] = before < self._cut.room
            self._used += int(tied[before < self._cut.room].sum())
        return taken


def scrambled(hashes: np.ndarray, purpose: int) -> np.ndarray:
    """Hashes as independent keys for another purpose: splitmix64's finalizer."""
    keys = hashes ^ np.uint64(purpose * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(_MIX[0])
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(_MIX[1])
    return keys ^ (keys >> np.uint64(31))


def weighted_keys(hashes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Keys whose smallest are a sample without replacement, likely by weight.

    An exponential variable of rate `weight` per document, from its hash: Efraimidis and Spirakis,
    Information Processing Letters 97 (2006), in its exponential form.
    """
    uniform = (scrambled(hashes, 2) >> np.uint64(11)).astype(np.float64) + 0.5
    return ordered(-np.log(uniform / 2**53) / weights)


def ordered(values: np.ndarray, *, descending: bool = False) -> np.ndarray:
    """float64 as uint64 in the same order (or the reverse)."""
    bits = np.ascontiguousarray(values + 0.0, np.float64).view(np.uint64)  # -0.0 becomes 0.0
    negative = (bits >> np.uint64(63)).astype(bool)
    keys = np.where(negative, ~bits, bits | np.uint64(1 << 63))
    return ~keys if descending else keys

"""Seeded permutations of 0 .. n-1 that are computed where they are read and never stored.

Above SMALL, a number is written as (left, right) in a rectangle of a * b >= n cells and goes
through ROUNDS of an unbalanced Feistel network over Z_a x Z_b:

    left  <- left  + F(key, right)  mod a        then        right <- right + F(key, left)  mod b

Each round can be undone, so the network permutes the rectangle. What leaves 0 .. n-1 goes through
again until it is back inside (cycle walking; Black and Rogaway, CT-RSA 2002, section 3): that
permutes 0 .. n-1. With a = ceil(sqrt(n)) fewer than a cells are outside. F is the finalizer of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Up to SMALL, the numbers are sorted by such a hash:
every permutation is then equally likely, which a network over a few cells does not give.

Only 64-bit integer arithmetic and a stable sort are used, so that an order is the same on every
machine and with every version of numpy.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

ROUNDS = 8
SMALL = 2048
_U64 = np.uint64


class Permutation:
    """The permutation of 0 .. size-1 that `key` names."""

    def __init__(self, size: int, key: str) -> None:
        """`key` is any text. Raises ValueError for a size outside of 1 .. 2^62."""
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"size={size}: a permutation has 1 to 2^62 numbers")
        self.size = size
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(_U64)
        self._table = None
        if size <= SMALL:
            hashes = _mix(np.arange(size, dtype=_U64), self._keys[0])
            self._table = np.argsort(hashes, kind="stable")
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)

    def __call__(self, begin: int, end: int) -> np.ndarray:
        """What stands at the places begin .. end-1, int64 [end - begin]."""
        if self._table is not None:
            return self._table[begin:end].astype(np.int64)
        values = self._shuffle(np.arange(begin, end, dtype=_U64))
        outside = np.flatnonzero(values >= _U64(self.size))
        while outside.size:
            again = self._shuffle(values[outside])
            values[outside] = again
            outside = outside[again >= _U64(self.size)]
        return values.astype(np.int64)

    def place_of(self, value: int) -> int:
        """Where `value` stands: the inverse of a call."""
        if self._table is not None:
            return int(np.flatnonzero(self._table == value)[0])
        places = self._unshuffle(np.array([value], _U64))
        while places[0] >= _U64(self.size):
            places = self._unshuffle(places)
        return int(places[0])

    def _unshuffle(self, values: np.ndarray) -> np.ndarray:
        rows, columns = _U64(self._rows), _U64(self._columns)
        left, right = values // columns, values % columns
        for number in reversed(range(0, ROUNDS, 2)):
            right = (right + columns - _mix(left, self._keys[number + 1]) % columns) % columns
            left = (left + rows - _mix(right, self._keys[number]) % rows) % rows
        return left * columns + right

    def _shuffle(self, values: np.ndarray) -> np.ndarray:
        rows, columns = _U64(self._rows), _U64(self._columns)
        left, right = values // columns, values % columns
        for number in range(0, ROUNDS, 2):
            left = (left + _mix(right, self._keys[number]) % rows) % rows
            right = (right + _mix(left, self._keys[number + 1]) % columns) % columns
        return left * columns + right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash of each value, uint64 like them; sums and products of arrays wrap around."""
    mixed = values * _U64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> _U64(27))) * _U64(0x94D049BB133111EB)
    return mixed ^ (mixed >> _U64(31))

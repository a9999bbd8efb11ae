"""A set of 64-bit hashes in one numpy array: 11 to 27 bytes per entry, where Python's set needs 90.

Open addressing with linear probing. Several hashes are asked for or added at once.
"""

from __future__ import annotations

import numpy as np

FIRST_SLOTS = 1 << 10
MAX_FILL = 0.7  # then the table doubles


class HashSet64:
    """Adds uint64 hashes and says which are in. Hashes must already look random."""

    def __init__(self) -> None:
        self._slots = np.zeros(FIRST_SLOTS, np.uint64)  # 0: free
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def memory_bytes(self) -> int:
        """Bytes of the table."""
        return self._slots.nbytes

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """For each of `hashes`, uint64 [n]: whether it is in, bool [n]."""
        wanted = _nonzero(hashes)
        found = np.zeros(wanted.size, bool)
        mask = np.uint64(self._slots.size - 1)
        places = wanted & mask
        open_ = np.arange(wanted.size)
        while open_.size:
            held = self._slots[places[open_]]
            found[open_[held == wanted[open_]]] = True
            open_ = open_[(held != 0) & (held != wanted[open_])]
            places[open_] = (places[open_] + np.uint64(1)) & mask
        return found

    def add(self, hashes: np.ndarray) -> None:
        """Add `hashes`, uint64 [n]; those that are in already, or twice, are added once."""
        new = np.unique(_nonzero(hashes))
        new = new[~self.contains(new)]
        while self._count + new.size > MAX_FILL * self._slots.size:
            self._double()
        self._insert(new)
        self._count += new.size

    def _insert(self, hashes: np.ndarray) -> None:
        """Put different hashes, none of which is in, into free slots."""
        mask = np.uint64(self._slots.size - 1)
        places = hashes & mask
        while hashes.size:
            free = self._slots[places] == 0
            # Of several that want one slot the last writes it; who did not stay tries the next.
            self._slots[places[free]] = hashes[free]
            left = self._slots[places] != hashes
            hashes, places = hashes[left], (places[left] + np.uint64(1)) & mask

    def _double(self) -> None:
        old = self._slots[self._slots != 0]
        self._slots = np.zeros(2 * self._slots.size, np.uint64)
        self._insert(old)


def _nonzero(hashes: np.ndarray) -> np.ndarray:
    """0 marks a free slot, so the hash 0 is kept as 1."""
    return np.maximum(np.asarray(hashes, np.uint64), np.uint64(1))

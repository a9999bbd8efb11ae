"""Hashes of a dataset's files by blocks: made while writing, compared when reading.

Of every `BLOCK_BYTES` of a .bin and of an .idx the manifest holds the first 128 bits of SHA-256. A
damaged block is thus found and named without its neighbours, a few blocks can be looked at where
all would take hours, and a writer that resumes hashes only its last block again.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

from equilibrium_mcore.files.errors import FileContentError

BLOCK_BYTES = 16 << 20
READ_BYTES = 1 << 20
DIGITS = 32  # hexadecimal, of each block
# What opening a blend reads at most, over all of its sources.
SAMPLED_BYTES = 64 << 20
SAMPLED_BLOCKS = 64


@dataclass(frozen=True)
class BlockHashes:
    """Hashes of both files, in order; each list has one entry per begun block.

    `fingerprint` is that of `indexed_files.fingerprint`: a few kilobytes from all over the dataset.
    """

    bin: list[str]
    idx: list[str]
    fingerprint: str
    block_bytes: int = BLOCK_BYTES

    @property
    def content(self) -> str:
        """One short hash of all: datasets that share it are the same, byte for byte."""
        text = f"{self.block_bytes} {' '.join(self.bin)} / {' '.join(self.idx)}"
        return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


class BlockHasher:
    """Hashes what passes by, in blocks; `whole` are those of full blocks, given or made."""

    def __init__(self, whole: Sequence[str] = (), *, block_bytes: int = BLOCK_BYTES) -> None:
        self.whole = list(whole)
        self._block_bytes = block_bytes
        self._state, self._filled = hashlib.sha256(), 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the bytes that follow."""
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[: self._block_bytes - self._filled]
            self._state.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == self._block_bytes:
                self.whole.append(self._state.hexdigest()[:DIGITS])
                self._state, self._filled = hashlib.sha256(), 0

    def hashes(self) -> list[str]:
        """Of all blocks so far, the begun one included."""
        return [*self.whole, *([self._state.hexdigest()[:DIGITS]] if self._filled else [])]


class HashedStream:
    """A stream for writing that hashes what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.hasher = stream, BlockHasher()

    def write(self, data: bytes) -> None:
        """Write and hash."""
        self._stream.write(data)
        self.hasher.update(data)


def rehash(path: Path, whole: Sequence[str], end: int) -> BlockHasher:
    """A hasher that has seen the first `end` bytes of a file, of which `whole` are known.

    Reads only what comes after the known blocks. Raises ValueError where the file is shorter.
    """
    hasher = BlockHasher(whole[: end // BLOCK_BYTES])
    left = end - len(hasher.whole) * BLOCK_BYTES
    with path.open("rb") as stream:
        stream.seek(end - left)
        while left:
            data = stream.read(min(left, READ_BYTES))
            if not data:
                raise FileContentError(f"{path} became shorter while it was read: start again")
            hasher.update(data)
            left -= len(data)
    return hasher


@dataclass(frozen=True)
class Block:
    """One block of one file, with the hash that it should have."""

    path: Path
    start: int
    end: int
    wanted: str

    def check(self) -> int:
        """Its number of bytes. Raises ValueError if they are not those that were written."""
        state, left = hashlib.sha256(), self.end - self.start
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            while data := stream.read(min(left, READ_BYTES)):
                state.update(data)
                left -= len(data)
        if left or state.hexdigest()[:DIGITS] != self.wanted:
            raise damage(self.path, self.start, self.end, state.hexdigest(), self.wanted)
        return self.end - self.start


def compare_read(path: Path, made: Sequence[str], wanted: Sequence[str], size: int) -> None:
    """Raise ValueError for the first block in which what was read is not what was written."""
    for number, pair in enumerate(zip(made, wanted, strict=True)):
        if pair[0] != pair[1]:
            start = number * BLOCK_BYTES
            raise damage(path, start, min(start + BLOCK_BYTES, size), *pair)


def damage(path: Path, start: int, end: int, found: str, wanted: str) -> FileContentError:
    """The error of a block whose bytes are not those that were written."""
    return FileContentError(
        f"{path}: bytes {start:,} to {end:,} are not those that were written (SHA-256 "
        f"{found[:12]}..., its manifest has {wanted[:12]}...): the file is damaged or another one. "
        f"Copy it again, or make the dataset again"
    )


class FileBlocks:
    """The blocks of one file, made when they are asked for: a large dataset has many.

    Raises ValueError where the hashes are those of a file of another size.
    """

    def __init__(self, path: Path, wanted: list[str], block_bytes: int, size: int) -> None:
        self.path, self._wanted, self._block_bytes, self._size = path, wanted, block_bytes, size
        if len(wanted) != -(-size // block_bytes):
            raise FileContentError(
                f"{path} has {size:,} bytes, but its manifest has the hashes of {len(wanted):,} "
                f"blocks of {block_bytes:,}: one of them is of another dataset. Copy the dataset's "
                f"files again, or make it again"
            )

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, number: int) -> Block:
        if not 0 <= number < len(self._wanted):
            raise IndexError(number)
        start = number * self._block_bytes
        end = min(start + self._block_bytes, self._size)
        return Block(self.path, start, end, self._wanted[number])


def blocks_of(hashes: BlockHashes, binary: Path, index: Path) -> list[FileBlocks]:
    """The blocks of a dataset's two files. Raises ValueError as FileBlocks does."""
    pairs = ((binary, hashes.bin), (index, hashes.idx))
    return [
        FileBlocks(path, wanted, hashes.block_bytes, path.stat().st_size) for path, wanted in pairs
    ]


def sample_blocks(files: Sequence[FileBlocks], *, seed: str) -> list[Block]:
    """Some blocks of these files, each with the same chance; all of them where they are few.

    Bounded by SAMPLED_BLOCKS and SAMPLED_BYTES however many files there are and however large.
    """
    ends = list(accumulate(map(len, files)))
    total = ends[-1] if ends else 0
    chosen: list[Block] = []
    room = SAMPLED_BYTES
    for number in random.Random(seed).sample(range(total), min(total, SAMPLED_BLOCKS)):
        place = bisect_right(ends, number)
        block = files[place][number - (ends[place] - len(files[place]))]
        room -= block.end - block.start
        if room < 0:
            break
        chosen.append(block)
    return chosen

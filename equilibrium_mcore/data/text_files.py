"""Lines of text files, plain, gzip or Zstandard, in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from equilibrium_mcore.data.compression import compression_of, decompressed_blocks
from equilibrium_mcore.data.inputs import BYTE_ORDER_MARK

BLOCK_BYTES = 1 << 20


def lines_of_range(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of every line that begins in [start, end), without its newline.

    Ranges that cut a file at any bytes give each line exactly once.
    """
    with path.open("rb") as stream:
        if start > 0:
            stream.seek(start - 1)
            stream.readline()  # the line that an earlier range owns
        while (offset := stream.tell()) < end:
            line = stream.readline()
            if not line:
                return
            yield offset, _clean(line, first=offset == 0)


def lines_of_compressed(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a compressed file; raises ValueError when it is damaged."""
    number, rest = 0, []
    for block, _ in decompressed_blocks(path, compression_of(path) or ""):
        first, *more = block.split(b"\n")
        rest.append(first)
        for part in more:
            number += 1
            yield number, _clean(b"".join(rest), first=number == 1)
            rest = [part]
    if tail := b"".join(rest):
        yield number + 1, _clean(tail, first=number == 0)


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a file, plain or compressed. Raises ValueError for a pipe."""
    if compression_of(path) is not None:
        yield from lines_of_compressed(path)
    else:
        lines = lines_of_range(path, 0, path.stat().st_size)
        yield from ((number, line) for number, (_, line) in enumerate(lines, start=1))


def _clean(line: bytes, *, first: bool) -> bytes:
    return (line.removeprefix(BYTE_ORDER_MARK) if first else line).rstrip(b"\r\n")


def line_number(path: Path, offset: int) -> int:
    """The number, from 1, of the line at a byte offset. Reads the file up to there."""
    count, left = 1, offset
    with path.open("rb") as stream:
        while left > 0 and (block := stream.read(min(BLOCK_BYTES, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count

"""Lines of text files, plain, gzip or Zstandard, in a stream."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst")


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
            yield (
                offset,
                (line.removeprefix(BYTE_ORDER_MARK) if offset == 0 else line).rstrip(b"\r\n"),
            )


def lines_of_compressed(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a .gz or .zst file; raises ValueError when it is damaged."""
    blocks = _gzip_blocks(path) if path.suffix == ".gz" else _zstd_blocks(path)
    number, rest = 0, []
    for block in blocks:
        first, *more = block.split(b"\n")
        rest.append(first)
        for part in more:
            number += 1
            line = b"".join(rest)
            yield (
                number,
                (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).rstrip(b"\r"),
            )
            rest = [part]
    if tail := b"".join(rest):
        yield number + 1, tail


def line_number(path: Path, offset: int) -> int:
    """The number, from 1, of the line at a byte offset. Reads the file up to there."""
    count, left = 1, offset
    with path.open("rb") as stream:
        while left > 0 and (block := stream.read(min(BLOCK_BYTES, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _gzip_blocks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again") from None


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    """Frame by frame: the library's own reader takes a file that is cut short for a whole one."""
    zstandard = import_zstandard(path)
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    with path.open("rb") as stream:
        while data := stream.read(BLOCK_BYTES):
            while data:
                try:
                    block = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise ValueError(
                        f"{path} is not Zstandard data, or damaged ({error}); fetch it again"
                    ) from None
                begun = True
                if block:
                    yield block
                data = b""
                if frame.eof:
                    data, begun = frame.unused_data, False
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if begun:
        raise ValueError(f"{path} is cut short: its last frame does not end; fetch it again")


def import_zstandard(path: object):
    """The library, or ImportError with the command that installs it."""
    try:
        import zstandard
    except ImportError:
        raise ImportError(
            f"{path} needs the package zstandard: pip install 'equilibrium_mcore[data]'"
        ) from None
    return zstandard

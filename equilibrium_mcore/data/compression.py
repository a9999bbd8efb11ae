"""Which files are compressed, told by their first bytes, and the content of those that are."""

from __future__ import annotations

import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equilibrium_mcore.files.errors import reason

READ_BYTES = 1 << 18  # of a compressed file at a time
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# Sixteen kinds of frames that a reader of Zstandard skips (RFC 8878, 3.1.2); a file may begin so.
SKIPPABLE = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))
MAGIC: dict[str, tuple[bytes, ...]] = {"gzip": (GZIP,), "zstd": (ZSTD, *SKIPPABLE)}
SUFFIXES = {".gz": "gzip", ".zst": "zstd"}


def compression_of(path: Path) -> str | None:
    """ "gzip", "zstd" or None, by the first bytes of the file.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for a pipe, and for a file that is
    not what its name says.
    """
    refuse_pipe(path)
    with path.open("rb", buffering=0) as stream:
        head = stream.read(4)
    found = next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)
    promised = SUFFIXES.get(path.suffix)
    if promised != found and promised is not None and head:
        raise ValueError(
            f"{path} is not {promised}, as its name says: it starts with {head.hex(' ')}. Give it "
            f"the name of what it is, or download it again"
        )
    return found


def refuse_pipe(path: Path) -> None:
    """Raise ValueError for a pipe or a device, before it is opened: its size says nothing."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(
            f"{path} is no file but a pipe or a device, which can be read only once: text is read "
            f"in pieces, and again where a run resumes. Write it to a file first"
        )


def _decompressor(compression: str) -> Any:
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def decompressed_blocks(path: Path, compression: str) -> Iterator[tuple[bytes, int]]:
    """The content of a compressed file in blocks, each with the bytes read from disk so far.

    Members and frames one after the other are one content. Raises ValueError that names the file
    if it is damaged or cut short.
    """
    import zstandard

    stage = None
    done = read = 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(READ_BYTES):
                read += len(chunk)
                while chunk:
                    if stage is None and not chunk.strip(b"\0"):
                        break  # padding after the last member, as tapes and some tools leave it
                    stage = stage or _decompressor(compression)
                    block = stage.decompress(chunk)
                    done += len(block)
                    yield block, read
                    chunk = stage.unused_data if stage.eof else b""
                    stage = None if stage.eof else stage
    except (zlib.error, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path} is damaged: {compression} cannot read on after {done:,} bytes of content "
            f"({reason(error)}). Copy it again"
        ) from None
    if stage is not None:
        raise ValueError(
            f"{path} is cut short: its {compression} stream has no end after {done:,} bytes of "
            f"content. Copy it again"
        )

"""What a source is cut into, so that workers can read it: plain values that travel to them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourcePart:
    """Rows that one worker reads in order.

    kind: one of `readers._ROWS`; path: a file or folder, or the Hub's name; begin, end: bytes of a
    JSONL file, a row group, rows of a folder, or the number of a shard of a stream.
    """

    kind: str
    path: str
    begin: int = 0
    end: int = 0
    split: str = ""


class BadRowError(ValueError):
    """A row that is no document; the message names the file, the row and what is wrong."""

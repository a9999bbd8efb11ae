"""What a source is cut into, so that workers can read it: plain values that travel to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.data.text_files import line_number


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
    """A row that is no document. As a row of `readers.rows_of` its text says what is wrong; as an
    error that is raised, also the dataset, the file, the row and a way out.
    """


@dataclass(frozen=True)
class LinePlace:
    """A line of a plain file, by its byte. To tell its number means to read up to there."""

    path: str
    offset: int

    def __str__(self) -> str:
        return f"{self.path}, line {line_number(Path(self.path), self.offset):,}"

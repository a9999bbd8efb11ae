"""Files of JSON lines that a process appends to while others read them: metrics, the data ledger.

Every line is whole, but for the last one, which a kill may have cut short. Files of text to train
on are read by `equilibrium_mcore.data.jsonl`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from equilibrium_mcore.files.errors import reason
from equilibrium_mcore.files.named import NamedFile
from equilibrium_mcore.files.whole import sync_stream


def json_line(record: Mapping[str, Any], *, ascii_only: bool = False) -> bytes:
    """A record as a line, with its newline; as UTF-8, which `ascii_only` escapes.

    Raises ValueError for a number that is not finite, since JSON has none, and where half of a
    surrogate pair (as in the name of a file that is no UTF-8) is not escaped.
    """
    text = json.dumps(record, ensure_ascii=ascii_only, allow_nan=False)
    return text.encode() + b"\n"


class JsonLinesLog:
    """Appends records, each with one write call, so that no two are ever mixed up."""

    def __init__(self, path: Path) -> None:
        """Open `path`, which is made with its folder where it is missing.

        What a killed process left of its last line is removed: it would spoil the next one.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = NamedFile(path, "a+")
        self._drop_cut_line()

    def __enter__(self) -> JsonLinesLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: Mapping[str, Any], *, durable: bool = False) -> None:
        """Append; the line is in the file, whole, when this returns, and on the disk if `durable`.

        Raises OSError where only a part of it was written.
        """
        line = json_line(record, ascii_only=True)
        if self._stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if durable:
            sync_stream(self._stream)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _drop_cut_line(self) -> None:
        if (end := self._stream.seek(0, os.SEEK_END)) == 0:
            return
        self._stream.seek(end - 1)
        if self._stream.read(1) != b"\n":
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)


def read_log(
    path: Path,
    *,
    keys: tuple[str, ...] = (),
    broken: Callable[[str], object] | None = None,
) -> Iterator[dict[str, Any]]:
    """The records of a log, in order; each has `keys`.

    A last line that was cut short (its process was killed, or is writing) is left out. Raises
    ValueError that names file and line for anything else that is no such record; `broken` is
    called with that text instead, and the line left out.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not record.keys() >= set(keys):
                raise ValueError(f"a record is an object with {', '.join(keys) or 'keys'}")
        except ValueError as error:  # of UTF-8 and of JSON, too
            # Every whole line ends in a newline, so only what follows the last one may be cut.
            if number == len(lines):
                return
            text = f"{path}, line {number}: no record of this log: {reason(error)}"
            if broken is None:
                raise ValueError(text) from None
            broken(text)
            continue
        yield record

"""Texts of a JSONL file, plain, gzip or Zstandard, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from equilibrium_mcore.data.text_files import lines_of


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of each line that is not blank.

    Raises FileNotFoundError, and ValueError that names the line which is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a JSONL file, plain, .gz or .zst")
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        yield number, record


def read_texts(path: Path, names: Sequence[str]) -> Iterator[str]:
    """The texts under `names` of each line; a value is a text, or a list of texts (choices).

    Raises ValueError for a line that has none of them, or something else under one.
    """
    for number, record in read_records(path):
        values = [record[name] for name in names if name in record]
        texts = [v for value in values for v in (value if isinstance(value, list) else [value])]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path}, line {number}: no text under {', '.join(names)}; it has "
                f"{', '.join(map(repr, record)) or 'no keys'}; name the keys that hold text"
            )
        yield from texts

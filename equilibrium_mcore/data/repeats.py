"""The same data under two names: told by what files hold, since names and folders say nothing.

A source that stands twice in a blend counts twice, and no limit on epochs notices.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

PIECES = 16  # places of a file that are compared
PIECE_BYTES = 4096


def same_text(files: Iterable[tuple[str, Path]]) -> list[str]:
    """Which of these (group, file) repeat a file of an earlier group, each pair in words.

    Within a group only one file under two names (a link) counts: shards of a set may well be
    alike. Files are read where their sizes are equal, and of large ones `PIECES` places.
    """
    by_size: dict[int, list[tuple[str, Path, os.stat_result]]] = defaultdict(list)
    for group, path in files:
        state = path.stat()
        if state.st_size:
            by_size[state.st_size].append((group, path, state))
    found = []
    for size, entries in by_size.items():
        if len(entries) > 1:
            found += _repeats_of_size(size, entries)
    return found


def _repeats_of_size(size: int, entries: list[tuple[str, Path, os.stat_result]]) -> list[str]:
    found: list[str] = []
    first: dict[str, tuple[str, Path]] = {}
    links: dict[tuple[int, int], Path] = {}
    for group, path, state in entries:
        content = sampled_hash(path, size)
        other, its_path = first.setdefault(content, (group, path))
        same_file = links.get((state.st_dev, state.st_ino))
        links.setdefault((state.st_dev, state.st_ino), path)
        if other != group:
            found.append(f"{group} ({path}) and {other} ({its_path})")
        elif same_file is not None:
            found.append(f"{group}: {path} and {same_file}")
    return found


def sampled_hash(path: Path, size: int) -> str:
    """A hash of a file's size and of places spread over it; of all of a small one."""
    state = hashlib.blake2b(str(size).encode(), digest_size=16)
    last = max(0, size - PIECE_BYTES)
    with path.open("rb", buffering=0) as stream:
        for piece in range(PIECES):
            stream.seek(last * piece // (PIECES - 1))
            state.update(stream.read(PIECE_BYTES))
    return state.hexdigest()


def same_values(values: Mapping[str, object]) -> list[str]:
    """Which names have the value of an earlier one, each pair in words."""
    first: dict[object, str] = {}
    pairs = ((name, first.setdefault(value, name)) for name, value in values.items())
    return [f"{name} and {other}" for name, other in pairs if name != other]

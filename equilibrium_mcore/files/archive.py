"""Moves what is there out of the way: into a numbered folder, whole, deleting nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from equilibrium_mcore.files.whole import rename_durably

ARCHIVE = "archive"
_UNFINISHED = ".unfinished"


def move_to_archive(folder: Path, names: Iterable[str]) -> Path | None:
    """Move what `folder` holds under `names` into `<folder>/archive/<number>`; None if nothing.

    Everything keeps its name, and all of it gets to one place: a call that was killed is finished
    by the next one, in the same place.
    """
    there = [name for name in names if os.path.lexists(folder / name)]
    left = sorted((folder / ARCHIVE).glob(f"*{_UNFINISHED}"))
    if left and any(os.path.lexists(left[0] / name) for name in there):
        _finish(left.pop(0))  # all of it had been moved, and a new run wrote since
    if not there and not left:
        return None
    place = left[0] if left else _new_place(folder / ARCHIVE)
    for name in there:
        rename_durably(folder / name, place / name)
    return _finish(place)


def _new_place(archive: Path) -> Path:
    archive.mkdir(exist_ok=True)
    taken = [path.name.removesuffix(_UNFINISHED) for path in archive.iterdir()]
    number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
    place = archive / f"{number}{_UNFINISHED}"
    place.mkdir()
    return place


def _finish(place: Path) -> Path:
    final = place.with_name(place.name.removesuffix(_UNFINISHED))
    rename_durably(place, final)
    return final

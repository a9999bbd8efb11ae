"""What an output may replace: what the same tool wrote before, when it is told to, and no more.

A folder is known by the marker that its writer leaves in it, a file by its content. Everything else
(a run, a checkpoint, a folder or file of the user's, the input or a folder around it) is refused,
whatever it is called by: symbolic links and relative paths are resolved first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from equilibrium_mcore.files.paths import real_path
from equilibrium_mcore.files.whole import write_whole

MARKER = ".equilibrium_mcore.json"


def refuse_sources(outputs: Iterable[Path], sources: Iterable[Path], *, option: str) -> None:
    """Raises FileExistsError if an output is one of the files it is made of, or holds it."""
    outputs, sources = list(outputs), list(sources)
    for output in outputs:
        target = real_path(output)
        for source in sources:
            if not real_path(source).is_relative_to(target):
                continue
            place = "is" if real_path(source) == target else "holds"
            raise FileExistsError(
                f"{option} {output} {place} the input {source}, which would be lost: choose "
                f"another {option}"
            )


def writable_folder(
    output: Path, *, sources: Iterable[Path], overwrite: bool, option: str = "--output"
) -> Path:
    """The folder to write, links resolved: a new one, or with `overwrite` one that is marked.

    Raises FileExistsError for everything else that is there, and says what it is.
    """
    refuse_sources([output], sources, option=option)
    target = real_path(output)
    if not target.exists():
        return target
    if not overwrite:
        raise FileExistsError(
            f"{option} {output} exists: choose another, or pass --overwrite, which replaces what "
            "this tool wrote before"
        )
    foreign = _foreign(target)
    if foreign:
        raise FileExistsError(
            f"{option} {output} {foreign}: --overwrite replaces only a folder that this tool "
            f"wrote and nobody added to. Choose another {option}, or move it away"
        )
    return target


def mark_folder(folder: Path) -> None:
    """Leave the marker, with the names of all that was written, so that this may be replaced."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
    text = json.dumps({"written_by": "equilibrium_mcore", "files": names}, indent=2)
    write_whole(folder / MARKER, text + "\n")


def refuse_existing(
    outputs: Iterable[Path],
    *,
    overwrite: bool,
    is_ours: Callable[[Path], bool],
    what: str,
    option: str,
) -> None:
    """Raises FileExistsError if an output is there, unless `overwrite` and it `is_ours`.

    `what` says what is replaced then, e.g. "a dataset".
    """
    existing = [path for path in outputs if os.path.lexists(path)]
    if existing and not overwrite:
        raise FileExistsError(
            f"{', '.join(map(str, existing))} exists already; pass --overwrite to replace it, or "
            f"choose another {option}"
        )
    foreign = [path for path in existing if not (path.is_file() and is_ours(path))]
    if foreign:
        raise FileExistsError(
            f"{', '.join(map(str, foreign))} is not {what}: --overwrite replaces nothing else. "
            f"Choose another {option}, or move it away"
        )


def _foreign(folder: Path) -> str:
    """What a folder holds that no marker speaks of; "" if it may be replaced."""
    if not folder.is_dir():
        return "is a file"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not there:
        return ""
    try:
        values = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        known = {MARKER, *values["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:4])
        return f"holds {names} ... and no {MARKER}"
    added = sorted(there - known)
    return f"holds {', '.join(added[:4])}, which was added to it" if added else ""

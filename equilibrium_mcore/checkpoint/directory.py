"""Where checkpoints lie, which is the latest, and how one gets its final name.

    <output_directory>/checkpoints/step_00000100/   config.yaml, state.json, megatron-core's files
    <output_directory>/checkpoints/latest           the name of the newest whole one

A checkpoint is written under a name that ends in `.partial` and renamed when every rank is done, so
a folder with a final name is whole. Only the standard library is used here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

LATEST = "latest"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial"


def checkpoints_directory(run_directory: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_directory) / "checkpoints"


def checkpoint_path(run_directory: str | Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return checkpoints_directory(run_directory) / f"step_{step:08d}"


def partial_path(final: Path) -> Path:
    """The name under which `final` is written."""
    return final.with_name(final.name + _PARTIAL)


def list_checkpoints(run_directory: str | Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folder = checkpoints_directory(run_directory)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name).group(1)))


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint of a run's output directory; None if there is none.

    `directory` may also be one checkpoint's folder, which is then returned. Raises
    FileNotFoundError when `latest` names a folder that is gone.
    """
    directory = Path(directory)
    if (directory / STATE_FILE).is_file():
        return directory
    pointer = checkpoints_directory(directory) / LATEST
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (path / STATE_FILE).is_file():
        others = ", ".join(p.name for p in list_checkpoints(directory)) or "none"
        raise FileNotFoundError(
            f"{pointer} names {path.name}, which is not there. Whole checkpoints: {others}. Write "
            f"the name of one of them into {pointer}, or remove it to start from the beginning"
        )
    return path


def publish(final: Path, *, keep_last: int) -> None:
    """Give a written checkpoint its final name, point `latest` at it, drop the oldest. One rank."""
    if final.exists():  # a step that was saved before, in a run that was resumed from further back
        shutil.rmtree(final)
    os.replace(partial_path(final), final)
    _sync_directory(final.parent)
    aside = final.parent / f"{LATEST}{_PARTIAL}"
    with aside.open("w", encoding="utf-8") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, final.parent / LATEST)
    _sync_directory(final.parent)
    for old in [p for p in list_checkpoints(final.parent.parent) if p != final][
        : -keep_last + 1 or None
    ]:
        shutil.rmtree(old)


def remove_partial(run_directory: str | Path) -> list[str]:
    """Remove what a killed save left behind; the names that were removed. One rank."""
    folder = checkpoints_directory(run_directory)
    removed = []
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.endswith(_PARTIAL):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path.name)
    return removed


def write_state(folder: Path, state: dict) -> None:
    """Plain facts of a checkpoint, for people and tools."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict:
    """What `write_state` wrote."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def _sync_directory(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

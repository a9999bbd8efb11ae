"""Where checkpoints lie, which is the latest, and how one gets its final name.

    <output_directory>/checkpoints/step_00000100/   config.yaml, state.json, manifest.json, the data
    <output_directory>/checkpoints/latest           the name of the one to resume from

A checkpoint is written under a name that ends in `.partial` and renamed when every rank is done, so
a folder with a final name was written whole. Only the standard library is used here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from equilibrium_mcore.checkpoint.lineage import Lineage
from equilibrium_mcore.files.errors import reason
from equilibrium_mcore.files.whole import write_whole

LATEST = "latest"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
_NAME = re.compile(r"step_(\d{8,})")


def checkpoints_directory(run_directory: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_directory) / "checkpoints"


def checkpoint_path(run_directory: str | Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return checkpoints_directory(run_directory) / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name gives; None for a folder with another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else None


def list_checkpoints(run_directory: str | Path) -> list[Path]:
    """Folders with the name of a checkpoint, lowest step first."""
    folder = checkpoints_directory(run_directory)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=step_of)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint that a run would resume from, unchecked; None if there is none.

    `directory` may also be one checkpoint's folder, which is then returned.
    """
    directory = Path(directory)
    if (directory / ".metadata").is_file() or (directory / STATE_FILE).is_file():
        return directory
    return next(iter(resume_order(directory)[0]), None)


def resume_order(run_directory: str | Path) -> tuple[list[Path], str | None]:
    """The checkpoints to try, best first, and what is wrong with `latest`, if anything is.

    First what `latest` names, whatever is newer. Where `latest` is lost, the newest; where it
    names a step that is gone, the one before. Then those of lower steps that led to the first.
    """
    present = list_checkpoints(run_directory)
    pointer = checkpoints_directory(run_directory) / LATEST
    try:
        name = pointer.read_text(encoding="utf-8").strip()
        wrong = None if name else "is empty"
    except FileNotFoundError:
        name, wrong = "", "is missing" if present else None
    except (OSError, UnicodeDecodeError) as error:
        name, wrong = "", f"cannot be read: {reason(error)}"
    named = pointer.parent / name
    if name and Path(name).name == name and named.is_dir():
        return [named, *_led_to(named, present)], None
    if name:
        wrong = f"names {name[:80]!r}, which is not there"
        if (lost := step_of(named)) is not None:
            present = [path for path in present if step_of(path) < lost]
    newest = max(filter(peek_state, present), key=_age, default=None)
    if newest is None:
        return present[::-1], wrong
    unknown = [path for path in present if not peek_state(path)]
    found = {newest, *unknown, *_led_to(newest, present)}
    return sorted(found, key=step_of, reverse=True), wrong


def _led_to(first: Path, present: list[Path]) -> list[Path]:
    """Those before `first` that it continued, highest step first, or of which that is not known."""
    facts, step = peek_state(first), step_of(first)
    step = facts.get("step", 0) if step is None else step
    earlier = [path for path in reversed(present) if step_of(path) < step]
    if not facts.get("run"):
        return earlier
    line = Lineage.of(facts)
    return [path for path in earlier if line.holds(peek_state(path)) or not peek_state(path)]


def _age(checkpoint: Path) -> tuple[float, int]:
    """Newer is larger: by the time of saving, then by the step."""
    run = peek_state(checkpoint).get("run") or {}
    return float(run.get("saved_at", 0.0)), step_of(checkpoint)


def write_state(folder: Path, state: dict) -> None:
    """Plain facts of a checkpoint, for people and tools."""
    write_whole(folder / STATE_FILE, json.dumps(state, indent=2) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def peek_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote; empty where it cannot be read."""
    try:
        facts = read_state(folder)
        Lineage.of(facts)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}

"""How a checkpoint gets its final name, and what is removed then: nothing that others wrote.

    step_00000100.<run id>.partial/   writer.json, and `content`, which becomes step_00000100

Only the standard library is used here.
"""

from __future__ import annotations

import os
from pathlib import Path

from equilibrium_mcore.checkpoint.directory import (
    LATEST,
    checkpoints_directory,
    list_checkpoints,
    peek_state,
    step_of,
)
from equilibrium_mcore.checkpoint.lineage import Lineage, write_writer, writer_is_done
from equilibrium_mcore.checkpoint.manifest import (
    MANIFEST_FILE,
    DamagedCheckpointError,
    read_manifest,
)
from equilibrium_mcore.files.whole import (
    PARTIAL,
    REMOVED,
    remove_tree,
    rename_durably,
    set_aside_for_removal,
    write_whole,
)

_CONTENT = "content"


def start_partial(final: Path, line: Lineage) -> Path:
    """Make the folder into which a checkpoint is written. One rank."""
    partial = _partial(final, line)
    content = partial / _CONTENT
    content.mkdir(parents=True)
    write_writer(partial, line)
    return content


def partial_content(final: Path, line: Lineage) -> Path:
    """The folder that `start_partial` makes, for the other ranks."""
    return _partial(final, line) / _CONTENT


def _partial(final: Path, line: Lineage) -> Path:
    return final.with_name(f"{final.name}.{line.run}{PARTIAL}")


def publish(final: Path, line: Lineage) -> str | None:
    """Give a written checkpoint its final name, and point `latest` at it. One rank.

    A folder that has the name already (of a branch that was left, or a user's) is renamed, never
    removed; returns its new name.
    """
    renamed = None
    if final.exists() or final.is_symlink():
        renamed = _free_name(final).name
        rename_durably(final, final.with_name(renamed))
    rename_durably(partial_content(final, line), final)
    write_whole(final.parent / LATEST, final.name + "\n")
    remove_tree(_partial(final, line))
    return renamed


def go_back(run_directory: str | Path, line: Lineage, to: Path) -> list[str]:
    """Point `latest` at `to`, and rename the run's newer checkpoints; their new names. One rank."""
    renamed = []
    for path in list_checkpoints(run_directory):
        if step_of(path) > step_of(to) and line.holds(peek_state(path)):
            renamed.append(_free_name(path).name)
            rename_durably(path, path.with_name(renamed[-1]))
    write_whole(to.parent / LATEST, to.name + "\n")
    return renamed


def abandon_partial(final: Path, line: Lineage) -> None:
    """Remove what was written of a checkpoint that gets no name. One rank."""
    remove_tree(_partial(final, line))


def drop_oldest(run_directory: str | Path, line: Lineage, *, keep_last: int) -> list[Path]:
    """Take the names of the oldest checkpoints away; returns the folders to remove. One rank."""
    own = [path for path in list_checkpoints(run_directory) if not _why_left(path, line)]
    return [set_aside_for_removal(old) for old in own[:-keep_last]]


def _free_name(final: Path) -> Path:
    number = 1
    while os.path.lexists(path := final.with_name(f"{final.name}.abandoned-{number}")):
        number += 1
    return path


def left_alone(run_directory: str | Path, line: Lineage) -> dict[str, str]:
    """What lies among the checkpoints and is never removed, and why: by name."""
    folder = checkpoints_directory(run_directory)
    left = {
        path.name: reason
        for path in list_checkpoints(run_directory)
        if (reason := _why_left(path, line))
    }
    if folder.is_dir():
        for path in sorted(folder.glob(f"*{PARTIAL}")):
            if not writer_is_done(path, line):
                left[path.name] = "whoever writes it may be alive"
    return left


def _why_left(path: Path, line: Lineage) -> str | None:
    """Why a checkpoint is not this run's to remove; None when it is."""
    if path.is_symlink():
        return "a symbolic link"
    if not line.holds(peek_state(path)):
        return "of another run, or of a branch that was left"
    try:
        files = read_manifest(path)
    except DamagedCheckpointError:
        return "its manifest cannot be read"
    if files is None:
        return None
    more = {entry.name for entry in path.iterdir()} - files.keys() - {MANIFEST_FILE}
    return f"holds {min(more)}, which the run did not write" if more else None


def remove_partial(run_directory: str | Path, line: Lineage) -> list[str]:
    """Remove what killed saves left: own ones, and those whose writer is dead. One rank.

    Returns the names that were removed.
    """
    folder = checkpoints_directory(run_directory)
    removed = []
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        half = path.name.startswith(".step_") and path.name.endswith(REMOVED)
        if half or path.name.endswith(PARTIAL) and writer_is_done(path, line):
            remove_tree(path)
            removed.append(path.name)
    return removed

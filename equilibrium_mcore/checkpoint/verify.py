"""Verifies all checkpoints of a run, and says of each what it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.checkpoint.lineage import Lineage
from equilibrium_mcore.checkpoint.manifest import Damage, DamagedCheckpointError
from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from equilibrium_mcore.files.tables import terminal_table


@dataclass(frozen=True)
class CheckpointVerdict:
    """What was found of one checkpoint."""

    path: Path
    opened: OpenedCheckpoint | None  # None where it is damaged
    damages: list[Damage]
    seconds: float
    note: str  # latest, of the run's line, or of a branch that was left

    @property
    def row(self) -> tuple[str, ...]:
        """Name, files, GiB, seconds, verdict and note, as they are printed."""
        verdict = "DAMAGED" if self.opened is None else "whole"
        if self.opened is not None and self.opened.files is None:
            verdict = "no hashes"
        files = str(len(self.opened.files or {})) if self.opened else "-"
        gib = f"{self.opened.gib:.3f}" if self.opened else "-"
        return self.path.name, files, gib, f"{self.seconds:.2f}", verdict, self.note


def verify_directory(path: Path, *, workers: int) -> list[CheckpointVerdict]:
    """Every checkpoint of the run whose output directory is `path`, or the one that `path` is.

    Raises FileNotFoundError where there is none.
    """
    found = directory.list_checkpoints(path)
    if not found and directory.latest_checkpoint(path) == path:
        found = [path]
    if not found:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: give a run's output_directory, or one of its "
            "checkpoints/step_... folders"
        )
    return [_verdict(checkpoint, _note(checkpoint, path), workers) for checkpoint in found]


def _verdict(checkpoint: Path, note: str, workers: int) -> CheckpointVerdict:
    start, opened, damages = time.perf_counter(), None, []
    try:
        opened = open_checkpoint(checkpoint, needs_state=True, workers=workers)
    except DamagedCheckpointError as error:
        damages = error.damages
    return CheckpointVerdict(checkpoint, opened, damages, time.perf_counter() - start, note)


def _note(checkpoint: Path, run_directory: Path) -> str:
    if checkpoint == run_directory:
        return ""
    latest = directory.latest_checkpoint(run_directory)
    if checkpoint == latest:
        return "latest"
    facts = directory.peek_state(latest) if latest else {}
    if not isinstance(facts.get("step"), int):
        return ""
    return "" if Lineage.after(facts).holds(directory.peek_state(checkpoint)) else "another branch"


def as_text(verdicts: list[CheckpointVerdict]) -> str:
    """A table of the checkpoints, and a line for each damage."""
    head = ("checkpoint", "files", "GiB", "seconds", "verdict", "")
    lines = [terminal_table(head, [v.row for v in verdicts], align="lrrrl")]
    lines += [f"{v.path / d.file}: {d.what}" for v in verdicts for d in v.damages]
    if any(v.opened is not None and v.opened.files is None for v in verdicts):
        lines.append("no hashes: from before there were manifests; names and sizes alone fit")
    return "\n".join(lines)

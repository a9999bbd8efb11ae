"""Which checkpoints belong to a run's own line: those that led to where it stands.

Every process that trains has a run id, which its checkpoints carry in `state.json` with the ids
that it came from and the step at which each was left:

    "run": {"id": "5f0c...", "ancestors": [{"id": "91ab...", "step": 8}], "saved_at": 1764...}

A run that went back to step 8 has 8 and what came before on its line, and not the 12 of the run
that it left. Only the standard library is used here.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from equilibrium_mcore.files.owner import Owner
from equilibrium_mcore.files.whole import write_whole

WRITER_FILE = "writer.json"


@dataclass(frozen=True)
class Lineage:
    """The id of a run, and the runs that it continues, each up to a step; oldest first.

    The id of a checkpoint from before there were ids is None.
    """

    run: str | None
    ancestors: tuple[tuple[str | None, int], ...] = ()

    @classmethod
    def new(cls) -> Lineage:
        """The line of a run that starts from scratch."""
        return cls(secrets.token_hex(6))

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Lineage:
        """The line of the run that wrote a checkpoint, from its `state.json`."""
        run = facts.get("run") or {}
        before = [(entry["id"], entry["step"]) for entry in run.get("ancestors", [])]
        return cls(run.get("id"), tuple(before))

    @classmethod
    def after(cls, facts: dict[str, Any]) -> Lineage:
        """The line of a new run that continues a checkpoint."""
        parent = cls.of(facts)
        return cls(secrets.token_hex(6), (*parent.ancestors, (parent.run, facts["step"])))

    def holds(self, facts: dict[str, Any]) -> bool:
        """Whether the checkpoint of this `state.json` is on the line."""
        if not isinstance(facts.get("step"), int):
            return False
        run = Lineage.of(facts).run
        if run is not None and run == self.run:
            return True
        return any(run == owner and facts["step"] <= step for owner, step in self.ancestors)

    @property
    def runs(self) -> set[str]:
        """The ids on the line."""
        return {run for run in (self.run, *(run for run, _ in self.ancestors)) if run is not None}

    def facts(self) -> dict[str, Any]:
        """What `state.json` says of it."""
        before = [{"id": run, "step": step} for run, step in self.ancestors]
        return {"id": self.run, "ancestors": before, "saved_at": time.time()}


def write_writer(folder: Path, line: Lineage) -> None:
    """Note in a partial checkpoint who writes it."""
    owner = Owner.of_this_process(line.run or "")
    write_whole(folder / WRITER_FILE, json.dumps({"run": line.run, "owner": asdict(owner)}) + "\n")


def writer_is_done(folder: Path, line: Lineage) -> bool:
    """Whether a partial checkpoint was left by the run's own line, or by a process that is dead.

    Where that cannot be known (another host, no note) it is not.
    """
    try:
        writer = json.loads((folder / WRITER_FILE).read_text(encoding="utf-8"))
        run, owner = writer["run"], Owner(**writer["owner"])
        here = Owner.of_this_process(line.run or "")
        if run in line.runs:
            return True
        if owner.slurm_job and owner.slurm_job == here.slurm_job:  # did Slurm start it again?
            return int(owner.slurm_restarts or 0) < int(here.slurm_restarts or 0)
        # This process saves here no more; another one must have ended.
        return owner.is_dead() or (owner.is_alive_here() and owner.pid == here.pid)
    except (OSError, ValueError, KeyError, TypeError):
        return False

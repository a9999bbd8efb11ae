"""Who holds a lock: a process of a host, so that another can tell whether it is still there."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

JOB_VARIABLES = {  # of Slurm: field of Owner to variable
    "slurm_job": "SLURM_JOB_ID",
    "slurm_restarts": "SLURM_RESTART_COUNT",
    "slurm_step": "SLURM_STEP_ID",
}


@dataclass(frozen=True)
class Owner:
    """What a lock file says, as JSON.

    machine: the boot of the host and its process namespace: pids of another one (after a restart,
        in another container) mean nothing here, though the host's name is the same.
    process_start: clock ticks from the boot to the start of the process: a pid may be used again.
    token: tells two locks of one process apart.
    """

    host: str
    machine: str
    pid: int
    process_start: int | None
    slurm_job: str | None
    slurm_restarts: str | None
    slurm_step: str | None
    user: str
    name: str
    started: str
    token: str

    @classmethod
    def of_this_process(cls, name: str, environment: Mapping[str, str] = os.environ) -> Owner:
        """This process, at work on what is called `name`."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            **{field: environment.get(name) for field, name in JOB_VARIABLES.items()},
            user=_user(),
            name=name,
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            token=secrets.token_hex(8),
        )

    @classmethod
    def from_text(cls, text: str) -> Owner | None:
        """The owner that a lock file names; None if the file is cut short, or is something else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def to_text(self) -> str:
        """What the lock file holds."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def is_dead(self) -> bool:
        """Whether this owner was a process of this very machine and is there no more."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        return not is_alive(self.pid, self.process_start)

    def is_alive_here(self) -> bool:
        """Whether this owner is a process of this very machine, and runs."""
        same = (self.host, self.machine) == (socket.gethostname(), _machine())
        return same and is_alive(self.pid, self.process_start)

    def was_requeued_as(self, other: Owner) -> bool:
        """Whether Slurm ended this owner and started its job again as `other`.

        Two steps of one start of a job may well run at the same time; they are not meant.
        """
        if not self.slurm_job or self.slurm_job != other.slurm_job:
            return False
        steps = (self.slurm_step, other.slurm_step)
        two_steps = None not in steps and steps[0] != steps[1]
        return self.slurm_restarts != other.slurm_restarts or not two_steps

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return (
            f"run {self.name!r} of {self.user}: process {self.pid} on {self.host}{job}, since "
            f"{self.started}"
        )


def is_alive(pid: int, start: int | None) -> bool:
    """Whether a process of this machine runs, and is the one that began at `start` if known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    found = _stat(pid)
    if not found:
        return True  # a system without /proc
    return found[0] not in "ZX" and start in (None, int(found[19]))


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks after the boot; None on a system without /proc."""
    found = _stat(pid)
    return int(found[19]) if found else None


def _stat(pid: int) -> list[str]:
    """Linux' facts of a process from its state on (proc(5), field 3 and later); [] if unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())

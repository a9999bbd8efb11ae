"""What is said between a tool, the process that starts its ranks, and a rank."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.errors import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str  # how torch.distributed finds the others; "" for a rank that is alone

    @classmethod
    def alone(cls) -> RankInfo:
        """For a process that is the only rank: it meets nobody, and leaves no file."""
        return cls(rank=0, world_size=1, local_rank=0, init_method="")


def launcher_number(environment: Mapping[str, str], name: str) -> int:
    """A launcher's variable as a number. Raises ConfigError for what is none."""
    text = environment[name].strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(
            f"{name}={environment[name]!r}: a launcher gives a whole number of at least 0: start "
            f"the run by torchrun or srun, or unset {name} to start it plainly"
        )
    return int(text)


def rank_info_from_environment(environment: Mapping[str, str]) -> RankInfo | None:
    """Of this process, when torchrun or srun started it; None when it was started plainly.

    Raises ConfigError for variables that no launcher sets so.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if len(given) == 1:
        other = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ConfigError(
            f"{given[0]}={environment[given[0]]!r} is set and {other} is not, and a launcher sets "
            f"both: start the run by torchrun or srun, or unset {given[0]}"
        )
    if given:
        return _rank_info(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise ConfigError(
                    f"{name} is not set, so {environment['SLURM_STEP_NUM_TASKS']} Slurm tasks "
                    "cannot find each other: export it in the batch script, as "
                    "slurm/pretrain_3b.sh does"
                )
        return _rank_info(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return None


def _rank_info(environment: Mapping[str, str], rank: str, world: str, local: str) -> RankInfo:
    """By the names of the variables; the last may be missing."""
    number, world_size = launcher_number(environment, rank), launcher_number(environment, world)
    local_rank = launcher_number(environment, local) if local in environment else 0
    if number >= world_size:
        raise ConfigError(
            f"{rank}={number} with {world}={world_size}: ranks are 0 to {world_size - 1}"
            if world_size
            else f"{world}=0: a run has at least one rank"
        )
    if local_rank >= world_size:
        raise ConfigError(
            f"{local}={local_rank} with {world}={world_size}: the ranks of a host are numbered "
            f"from 0, and there are {world_size} in all"
        )
    return RankInfo(number, world_size, local_rank, init_method="env://")


@dataclass(frozen=True)
class TimeLimit:
    """How long a phase of several ranks may take before it counts as hung.

    Attributes:
        phase: what the ranks do, in the words of a message.
        raised_by: what a user does to raise the limit.
    """

    minutes: float
    phase: str
    raised_by: str


@dataclass(frozen=True)
class Job:
    """Work for `world_size` ranks.

    Attributes:
        work: the pickled function and what it takes after its RankInfo.
        modules: what it needs; imported once, before ranks are forked.
        folder: for the rendezvous, results, tracebacks and stacks of the ranks.
        threads: of each rank.
    """

    world_size: int
    work: bytes
    modules: tuple[str, ...]
    folder: Path
    threads: int
    limit: TimeLimit | None = None

    def rank_info(self, rank: int) -> RankInfo:
        return RankInfo(rank, self.world_size, rank, f"file://{self.folder / 'rendezvous'}")

    def file(self, rank: int, kind: str) -> Path:
        """A rank's `result`, `traceback` or `stack`."""
        return self.folder / f"rank_{rank}.{kind}"


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended: the pickled result of every rank, or what went wrong."""

    results: tuple[bytes, ...] = ()
    failure: str | None = None
    refused: bool = False  # the rank that failed first met a setting that cannot be
    told: bool = False  # the failure is in words that say what to do, without a traceback
    signalled: int = 0  # the signal that ended the rank that failed first, if one did


TOLD = 3  # the exit status of a rank whose error says in words what a user can do about it
REFUSED = 2  # the exit status of a rank, and of a tool, for what a setting asks and cannot be


class RankError(RuntimeError):
    """Ranks failed, were killed or did not end; the message has tracebacks or stacks.

    It has neither where `told`: the first failure was one of the operating system. `refused` says
    that the first of them met a setting that cannot be, `stopped_by` that a signal ended it which
    this process had handed on: it had nothing to save yet.
    """

    def __init__(
        self, message: str, *, refused: bool = False, told: bool = False, stopped_by: int = 0
    ) -> None:
        super().__init__(message)
        self.refused, self.told, self.stopped_by = refused, told, stopped_by


def pack(work: Callable[..., Any], arguments: tuple[object, ...]) -> tuple[bytes, str]:
    """Both pickled, and the function's module. Raises TypeError for what has no name in one."""
    function = work
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return pickle.dumps((work, arguments)), function.__module__
    except (AttributeError, pickle.PicklingError) as error:
        raise TypeError(
            f"{function!r} cannot be sent to ranks ({error}): pass a function of a module, or "
            f"functools.partial of one"
        ) from None

"""Ranks: taken from a launcher (torchrun, srun), or started here on a host without a GPU.

A rank that fails takes the job down within seconds, and its traceback is what is shown first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.layout import resolve_world_size
from equilibrium_mcore.config.schema import ParallelismConfig

GRACE_SECONDS = 1.0
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str  # how torch.distributed finds the others


def place_from_environment(environment: Mapping[str, str]) -> Place | None:
    """This process's place when torchrun or srun started it; None when it was started plainly."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            init_method="env://",
        )
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise ConfigError(
                    f"{name} is not set, so {environment['SLURM_STEP_NUM_TASKS']} Slurm tasks "
                    "cannot find each other: export it in the batch script, as "
                    "slurm/pretrain_3b.sh does"
                )
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment.get("SLURM_LOCALID", 0)),
            init_method="env://",
        )
    return None


def launch(layout: ParallelismConfig, run_rank: Callable[[Place], None]) -> int:
    """Call `run_rank` in every rank; returns the exit status of this process.

    Under a launcher this process is one rank. Else it starts the ranks of `layout` by fork, so that
    torch and megatron-core, imported before, are loaded once.
    """
    place = place_from_environment(os.environ)
    if place is not None:
        return _run_launched(place, run_rank)
    world_size = resolve_world_size(layout)
    with tempfile.TemporaryDirectory(prefix="equilibrium_ranks_") as folder:
        meeting_point = Path(folder) / "rendezvous"
        places = [
            Place(rank, world_size, rank, f"file://{meeting_point}") for rank in range(world_size)
        ]
        if world_size == 1:
            run_rank(places[0])
            return 0
        from equilibrium_mcore.parallel import accelerator

        if accelerator.has_cuda():
            raise ConfigError(
                f"the layout needs {world_size} ranks, and on a host with a GPU a launcher starts "
                f"them: torchrun --nproc-per-node {world_size} -m equilibrium_mcore.pretrain "
                "RUN.yaml"
            )
        return start_ranks(places, run_rank, folder=Path(folder))


def _run_launched(place: Place, run_rank: Callable[[Place], None]) -> int:
    try:
        run_rank(place)
    except Exception:
        print(f"rank {place.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # Leaving groups in order would wait for the other ranks, which wait for this one.
        os._exit(1)
    return 0


def start_ranks(places: list[Place], run_rank: Callable[[Place], None], *, folder: Path) -> int:
    """Fork one process per place and wait; 0 if all succeed.

    The first rank that fails ends the others after GRACE_SECONDS; its traceback is printed first,
    the rest of the failures in a line each.
    """
    threads = max(1, (os.cpu_count() or 1) // len(places))
    children: dict[int, Place] = {}
    sys.stdout.flush()
    sys.stderr.flush()
    for place in places:
        pid = os.fork()
        if pid == 0:
            os._exit(_child(place, run_rank, folder, threads))
        children[pid] = place

    def forward(number: int, frame) -> None:
        for pid in children:
            _send(pid, number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        failed = _wait(children)
    finally:
        for pid in children:
            _send(pid, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if not failed:
        return 0
    _report(failed, folder)
    return 1


def _child(place: Place, run_rank: Callable[[Place], None], folder: Path, threads: int) -> int:
    import torch

    for number in FORWARDED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent forwards
    torch.set_num_threads(threads)
    try:
        run_rank(place)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:
        # A setting that cannot be is told in its own words; anything else with its traceback.
        text = str(error) if isinstance(error, ConfigError) else traceback.format_exc()
        (folder / f"rank_{place.rank}.traceback").write_text(
            f"{time.time()}\n{text}", encoding="utf-8"
        )
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(children: dict[int, Place]) -> list[tuple[Place, int]]:
    """Wait until all have ended, or GRACE_SECONDS after the first failure; the failures."""
    failed: list[tuple[Place, int]] = []
    deadline = None
    while children:
        if deadline is not None and time.monotonic() > deadline:
            return failed
        try:
            pid, status = os.waitpid(-1, 0 if deadline is None else os.WNOHANG)
        except ChildProcessError:
            return failed
        if pid == 0:
            time.sleep(0.05)
            continue
        if pid not in children:
            continue
        place = children.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code:
            failed.append((place, code))
            deadline = deadline or time.monotonic() + GRACE_SECONDS
    return failed


def _report(failed: list[tuple[Place, int]], folder: Path) -> None:
    """Print failures, earliest first: a rank's own error comes before the broken connections."""
    stories = []
    for place, code in failed:
        path = folder / f"rank_{place.rank}.traceback"
        if path.exists():
            when, _, text = path.read_text(encoding="utf-8").partition("\n")
            stories.append((float(when), place.rank, text.strip()))
        else:  # killed, for example by the kernel for want of memory: it could not tell
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            stories.append((0.0, place.rank, f"it ended by {reason} without a traceback"))
    stories.sort()
    _, rank, text = stories[0]
    print(f"rank {rank} failed first:\n{text}", file=sys.stderr)
    for _, rank, text in stories[1:]:
        print(f"rank {rank} then failed: {text.splitlines()[-1][:200]}", file=sys.stderr)
    print(f"the other ranks were stopped ({len(failed)} failed)", file=sys.stderr, flush=True)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

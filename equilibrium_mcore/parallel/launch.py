"""Ranks of a run: taken from a launcher (torchrun, srun), or started here on a host without a GPU.

A rank that fails takes the job down within seconds, and its traceback is what is shown first.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.layout import resolve_world_size
from equilibrium_mcore.config.schema import ParallelismConfig
from equilibrium_mcore.parallel.rank_job import (
    REFUSED,
    TOLD,
    RankError,
    RankInfo,
    rank_info_from_environment,
)
from equilibrium_mcore.parallel.rank_process import story_of
from equilibrium_mcore.parallel.rank_server import RankServer
from equilibrium_mcore.processes.stacks import print_stacks_on_signal

MOST_LOCAL_RANKS = 64  # processes of some 0.5 GiB each
PACKAGE = Path(__file__).resolve().parents[1]

__all__ = ["RankInfo", "launch", "rank_info_from_environment", "this_command"]


def launch(layout: ParallelismConfig, run_rank: Callable[[RankInfo], None]) -> int:
    """Call `run_rank` in every rank; returns the exit status of this process.

    Under a launcher, and for a layout of one rank, this process is the rank. Else ranks are forked
    from it, so that torch and megatron-core, imported before, are loaded once: `run_rank` must be
    a function of a module, or a functools.partial of one. A run may take as long as it wants; on
    SIGUSR2 it prints where its ranks are.
    """
    rank_info = rank_info_from_environment(os.environ)
    if rank_info is not None:
        print_stacks_on_signal()
        return _run_launched(rank_info, run_rank)
    world_size = resolve_world_size(layout)
    if world_size == 1:
        print_stacks_on_signal()
        run_rank(RankInfo.alone())
        return 0
    refuse_local_ranks(layout)
    from equilibrium_mcore.parallel import accelerator

    if accelerator.has_cuda():
        raise ConfigError(
            f"the layout needs {world_size} ranks, and on a host with a GPU a launcher starts "
            f"them: torchrun --nproc-per-node {world_size} {this_command()}"
        )
    try:
        with RankServer() as server:
            server.run(world_size, run_rank, forward_signals=True)
    except RankError as failed:
        if failed.stopped_by:
            name = signal.Signals(failed.stopped_by).name
            print(f"stopped by {name} before the first step: nothing to save", file=sys.stderr)
            return 128 + failed.stopped_by
        print("error: " * failed.told + str(failed), file=sys.stderr, flush=True)
        return REFUSED if failed.refused else 1
    return 0


def refuse_local_ranks(layout: ParallelismConfig) -> None:
    """Raise ConfigError for more ranks than one host should fork."""
    world_size = resolve_world_size(layout)
    if world_size > MOST_LOCAL_RANKS:
        raise ConfigError(
            f"the layout needs {world_size:,} ranks, and without a launcher they are processes of "
            f"this host, at most {MOST_LOCAL_RANKS}: start it by torchrun or srun, or lower "
            "parallelism.world_size"
        )


def this_command() -> str:
    """What this process was started with, as a launcher takes it."""
    program, *arguments = sys.argv
    path = Path(program)
    named = ["-m", f"{path.parent.name}.{path.stem}"] if path.parent == PACKAGE else [program]
    return shlex.join([*named, *arguments])


def _run_launched(rank_info: RankInfo, run_rank: Callable[[RankInfo], None]) -> int:
    try:
        run_rank(rank_info)
    except Exception as error:
        text, code = story_of(error)
        how = ": error: " if code in (REFUSED, TOLD) else " failed:\n"
        print(f"rank {rank_info.rank}{how}{text}", file=sys.stderr, flush=True)
        # Leaving groups in order would wait for the other ranks, which wait for this one.
        os._exit(REFUSED if code == REFUSED else 1)
    return 0

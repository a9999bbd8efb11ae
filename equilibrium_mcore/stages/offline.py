"""Stages that train on data which is there before; what a stage adds to it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.last_collective import last_collectives
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.processes.hangs import stacks_when_stuck
from equilibrium_mcore.training.all_callbacks import MoreCallbacks, build_callbacks
from equilibrium_mcore.training.loop import train
from equilibrium_mcore.training.ready import check_adapters, check_policy
from equilibrium_mcore.training.run_folder import owned_run_folder
from equilibrium_mcore.training.setup import Run, setup, teardown

STACKS_SHARE = 0.9  # of the time-out of a collective: a rank that hangs says where, then ends


def train_rank(
    rank_info: RankInfo,
    *,
    config: RunConfig,
    complete: Callable[[Run], None] = lambda run: None,
    more_callbacks: MoreCallbacks = lambda config, log: [],
) -> None:
    """Train `config` as this rank, from setup to the last step or a stop.

    `complete` adds to the run what a stage needs besides, after setup; `more_callbacks` are its
    own. Collective.

    Where a collective does not return, `stacks/` in the output directory says where each rank
    was, and in which collective.
    """
    check_adapters(config)
    check_policy(config)
    stacks = Path(config.output_directory) / "stacks" / f"rank_{rank_info.rank:05d}.txt"
    patience = STACKS_SHARE * 60 * config.parallelism.timeout_minutes
    with (
        owned_run_folder(config, is_first_rank=rank_info.rank == 0) as lock,
        stacks_when_stuck(stacks, seconds=patience, more=last_collectives),
    ):
        run = setup(config, rank_info)
        complete(run)
        train(run, callbacks=build_callbacks(run.config, lock, more_callbacks))
        teardown(run)

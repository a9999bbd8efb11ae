"""Stages that train on data which is there before: pretraining, midtraining, fine-tuning."""

from __future__ import annotations

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training.callbacks import build_callbacks
from equilibrium_mcore.training.loop import train
from equilibrium_mcore.training.run_folder import owned_run_folder
from equilibrium_mcore.training.setup import setup, teardown


def train_rank(rank_info: RankInfo, *, config: RunConfig) -> None:
    """Train `config` as the rank of `place`, from setup to the last step or a stop."""
    with owned_run_folder(config, is_first_rank=rank_info.rank == 0) as lock:
        run = setup(config, rank_info)
        train(run, callbacks=build_callbacks(run.config, lock))
        teardown(run)

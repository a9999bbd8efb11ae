"""One saved run for the tests of this folder, and a process group of this process alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.parallel.process_groups import one_rank as world_of_one
from tests.checkpoint.support import MODEL
from tests.support.runs import tiny_run


def _train_and_save(rank_info: RankInfo, config: RunConfig) -> None:
    """Steps 1 to 3, each saved, by one process."""
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    callback = CheckpointCallback(config, LogCallback(config))
    for _ in range(3):
        callback.on_step(run, train_step(run))
    teardown(run)


@pytest.fixture(scope="package")
def saved_run(ranks, data, tmp_path_factory) -> Path:
    """An output directory with the checkpoints of steps 1, 2 and 3, written by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    changes = {
        "parallelism": {"world_size": 2},
        "model": MODEL,
        "checkpoint": {"keep_last": 5, "save_interval_steps": 1},
    }
    ranks.run(2, _train_and_save, tiny_run(data, folder, **changes))
    return folder


@pytest.fixture
def copied(saved_run, tmp_path) -> Path:
    """A copy of `saved_run` to damage."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


@pytest.fixture
def config(data, copied) -> Callable[..., RunConfig]:
    """The config of a run in `copied`, with changes to its checkpoint section."""

    def make(**checkpoint: Any) -> RunConfig:
        layout = {"world_size": 2}
        return tiny_run(data, copied, model=MODEL, parallelism=layout, checkpoint=checkpoint)

    return make


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process as the only rank."""
    with world_of_one(seed=1):
        yield

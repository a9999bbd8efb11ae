"""Stages that train on the policy's own answers: GRPO and its family."""

from __future__ import annotations

from collections.abc import Callable

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.generation.interface import Engine
from equilibrium_mcore.online.engine import engine_of
from equilibrium_mcore.online.setup import go_online, online_callbacks
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.stages.offline import train_rank
from equilibrium_mcore.training.setup import Run


def online_rank(
    rank_info: RankInfo,
    *,
    config: RunConfig,
    engine_of: Callable[[Run], Engine] = engine_of,
) -> None:
    """Train `config` on its own answers as this rank, from setup to the last step or a stop."""
    train_rank(
        rank_info,
        config=config,
        complete=lambda run: go_online(run, engine_of(run)),
        more_callbacks=online_callbacks,
    )

"""Distillation: a teacher, or what one said before, beside a run on text or conversations."""

from __future__ import annotations

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.stages.offline import train_rank
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.stored_targets import StoredTargets
from equilibrium_mcore.training.teacher import Teacher


def distill_rank(rank_info: RankInfo, *, config: RunConfig) -> None:
    """Train `config` by distillation as this rank, from setup to the last step or a stop."""
    train_rank(rank_info, config=config, complete=with_teacher)


def with_teacher(run: Run) -> None:
    """Give the run what it learns from: stored targets where they are named. Collective."""
    objective = run.config.objective
    if objective.targets is not None:
        run.prepare = StoredTargets(run)
    else:
        run.prepare = Teacher(run, objective.teacher)

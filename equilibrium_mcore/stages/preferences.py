"""Stages that train on pairs or on judged answers: a reference scores each batch before the policy
learns from it."""

from __future__ import annotations

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.objectives import REFERENCED, KtoConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.stages.offline import train_rank
from equilibrium_mcore.training.mismatched import Mismatched
from equilibrium_mcore.training.reference import Reference
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.stored_reference import StoredReference


def preference_rank(rank_info: RankInfo, *, config: RunConfig) -> None:
    """Train `config` on preferences as this rank, from setup to the last step or a stop."""
    train_rank(rank_info, config=config, complete=with_reference)


def with_reference(run: Run) -> None:
    """Give the run the reference that its objective needs. Collective."""
    objective = run.config.objective
    if not isinstance(objective, REFERENCED):
        return
    if run.config.checkpoint.initial_weights is None:
        raise ConfigError(
            f"objective.type={objective.type!r} without "
            "checkpoint.initial_weights: they are the reference"
        )
    reference = StoredReference(run) if objective.reference == "stored" else Reference(run)
    run.prepare = Mismatched(reference) if isinstance(objective, KtoConfig) else reference

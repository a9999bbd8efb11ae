"""The engine that answers prompts with the training modules themselves."""

from __future__ import annotations

from equilibrium_mcore.generation.engine import OwnEngine
from equilibrium_mcore.generation.interface import Engine
from equilibrium_mcore.training.setup import Run


def own_engine(run: Run) -> Engine:
    """The engine over the run's chunks, in its layout: no weight moves."""
    return OwnEngine.of(run, rows_at_once=run.config.rollout.rows)

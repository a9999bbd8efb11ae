"""The critic of PPO: a model of its own in the run's layout, which values what a policy has said.

It starts as the weights that the run starts from, or as others, e.g. a reward model's, with a head
of one value; it has an optimizer and a rate of its own. Each step of the policy is one of the
critic, on the same answers, before it; in the first ones the policy waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from equilibrium_mcore.checkpoint.choose import open_weights_together
from equilibrium_mcore.checkpoint.roles import Role, load_role
from equilibrium_mcore.checkpoint.sharded import load_weights
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.optimizers import REST
from equilibrium_mcore.config.policy import CriticConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.optim.optimizer import HybridOptimizer
from equilibrium_mcore.parallel.random_states import kept_random_states
from equilibrium_mcore.training.objective import Objective
from equilibrium_mcore.training.scoring import scalar_values
from equilibrium_mcore.training.setup import Run, build_chunks
from equilibrium_mcore.training.step import gradients_of, sum_over_ranks
from equilibrium_mcore.training.value_objective import Values

CRITIC = "critic"  # of a checkpoint: what its state stands under


class Critic:
    """Values of tokens, and updates of them. All methods are collective."""

    def __init__(self, run: Run, settings: CriticConfig) -> None:
        """Make the critic of `run`, which keeps it in its checkpoints; go on where one has it.

        Raises ConfigError for weights that are not there, or are another model's.
        """
        self._settings = settings
        config = critic_config(run.config, settings)
        with kept_random_states():
            transformer, chunks = build_chunks(config, run.groups)
        optimizer = HybridOptimizer(chunks, run.groups, config)
        transformer.grad_scale_func = optimizer.scale_loss
        objective: Objective = Values(settings.value_clip)
        self.run = replace(
            run,
            config=config,
            transformer=transformer,
            chunks=chunks,
            optimizer=optimizer,
            objective=objective,
            prepare=lambda run, batches: None,
            watch=None,
            roles={},
        )
        role = Role(chunks, optimizer)
        if run.resumed_from is not None:
            load_role(run.choice.checkpoint, CRITIC, role)
        else:
            self._start(config)
        run.roles[CRITIC] = role

    def values(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Of every position of this data rank's batches, [B, S] each."""
        return scalar_values(self.run, batches)

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One step on this data rank's part of a global batch; what it did, by name.

        Batches have `values` and `returns`, and are not changed.
        """
        outputs = gradients_of(self.run, [dict(batch) for batch in batches])
        figures, _, _ = sum_over_ranks(self.run, outputs)
        rate = self.run.optimizer.learning_rates()[REST]
        result = self.run.optimizer.step()
        return {
            "critic_loss": figures["loss"],
            "critic_gradient_norm": result.gradient_norm,
            "critic_learning_rate": rate,
        }

    def holds(self, run: Run) -> bool:
        """Whether the policy waits for the critic in the step to come."""
        return run.progress.step < self._settings.warmup_steps

    def _start(self, config: RunConfig) -> None:
        weights = self._settings.initial_weights or config.checkpoint.initial_weights
        if weights is None:
            raise ConfigError(
                "objective.critic without weights: set checkpoint.initial_weights, or "
                "objective.critic.initial_weights, to a run's output directory"
            )
        opened = open_weights_together(weights, verify=config.checkpoint.verify)
        load_weights(
            opened,
            config=config,
            chunks=self.run.chunks,
            groups=self.run.groups,
            optimizer=self.run.optimizer,
        )


def critic_config(config: RunConfig, settings: CriticConfig) -> RunConfig:
    """The run as its critic has it: a scalar head, whole weights, AdamW at its own rate."""
    optimizer = config.optimizer
    rates: dict[str, Any] = {"learning_rate": settings.learning_rate, "learning_rates": {}}
    changes = {
        "matrices": REST,
        "adamw": optimizer.adamw.model_copy(update=rates),
        "overrides": [],
        "schedule_free": None,
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"head": "scalar"}),
            "adapters": None,
            "training": config.training.model_copy(update={"frozen": [], "anomalies": None}),
            "optimizer": optimizer.model_copy(update=changes),
        }
    )

"""The balancing losses by themselves: an objective must not change their weight.

megatron-core scales them by a rank's positions, and divides by what it is told of the batch. An
objective that gives it another divisor (answers, pairs) re-weights them, in every layout and on
one rank alike, so that layouts agree and the experts' use drifts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from equilibrium_mcore.certify.whole import TensorShard, pieces_of
from equilibrium_mcore.config.objectives import NextTokenConfig
from equilibrium_mcore.training.all_objectives import build_objective
from equilibrium_mcore.training.objective import Objective, ObjectiveOutput
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.step import balances, gradients_of


class OnlyBalancing:
    """An objective whose own sum counts nothing: what is left are the balancing losses."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.figures, self.inputs = objective.figures, objective.inputs
        self.tokens_of, self.reads = objective.tokens_of, objective.reads
        self.carried = objective.carried

    def weigh(self, batch) -> float:
        """See Objective."""
        return self.objective.weigh(batch)

    def __call__(self, losses, batch, *, cp_group) -> ObjectiveOutput:
        """See Objective."""
        outcome = self.objective(losses, batch, cp_group=cp_group)
        return dataclasses.replace(outcome, total=outcome.total * 0.0)


def balancing_gradients(run: Run) -> dict[str, list[TensorShard]]:
    """The gradients of the balancing losses alone, under the run's objective and under next_token.

    Both of the same batches; nothing is updated. Empty where nothing balances the experts, and
    where the objective is next_token. Collective.
    """
    if run.config.objective.type == "next_token" or not balances(run):
        return {}
    batches = run.stream.next_batches(run.micro_batches)
    found = {}
    plain = build_objective(NextTokenConfig())
    for name, objective in (("own", run.objective), ("next_token", plain)):
        with _unmoved(run, OnlyBalancing(objective)):
            gradients_of(run, batches)
        gradients = {p.name: p.gradient for p in run.optimizer.parameters}
        found[name] = pieces_of(run, gradients)
    get_moe_metrics_tracker().clear()
    return found


@contextmanager
def _unmoved(run: Run, other: Objective) -> Iterator[None]:
    """With `other` as the objective; buffers, by which experts are balanced too, are put back."""
    own, run.objective = run.objective, other
    buffers = [buffer for chunk in run.chunks for buffer in chunk.module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        run.objective = own
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

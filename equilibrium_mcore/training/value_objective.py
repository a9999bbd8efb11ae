"""The objective of a critic: its values against the returns of a rollout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.models.heads import values_of
from equilibrium_mcore.objectives.reduction import token_mean
from equilibrium_mcore.objectives.value import value_loss
from equilibrium_mcore.training.objective import Batch, ObjectiveOutput

# Of a batch, [B, S], at the positions whose label was produced.
VALUES = "values"  # the critic's, before any update on the rollout
RETURNS = "returns"


class Values:
    """The mean of `objectives.value.value_loss` over produced tokens; it logs the loss.

    For models whose head is scalar: what a layer of logits would make losses of is values.
    """

    figures = ("loss",)
    tokens_of = "loss"
    has_perplexity = False
    reads = "losses"  # as a model of one head gives them
    carried = ()
    inputs = (VALUES, RETURNS)

    def __init__(self, clip: float | None) -> None:
        self._clip = clip

    def weigh(self, batch: Batch) -> float:
        """See Objective."""
        return token_mean(batch["loss_mask"], batch["position_ids"], None)[1]

    def __call__(self, output: Tensor, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """See Objective; `output` is what a ScalarHeadModel gives."""
        values = values_of(output).reshape(-1)
        mask = batch["loss_mask"].reshape(-1).to(values.dtype)
        old, returns = (
            torch.where(mask > 0, batch[name].reshape(-1).to(values.dtype), 0.0)
            for name in (VALUES, RETURNS)
        )
        total = (value_loss(values, old, returns, clip=self._clip) * mask).sum()
        return ObjectiveOutput(total, {"loss": (total.detach(), mask.sum())})

"""The objective of distillation: cross-entropy, and the divergence from what a teacher says.

What a teacher says of a micro-batch is carried by the batch under `TEACHER`, put there before the
step (`Run.prepare`) on the ranks of the last stage: the teacher's own hidden states
(`teacher.py`), its likeliest ids from a file (`target_files.py`), or made-up values in proofs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from equilibrium_mcore.config.objectives import DistillationConfig
from equilibrium_mcore.objectives.distillation import (
    WHOLE,
    Across,
    Mixture,
    TopK,
    distillation_losses,
)
from equilibrium_mcore.training.objective import Batch, Logits, ObjectiveOutput

TEACHER = "teacher"

OfTokens = Callable[[slice], Tensor | TopK]
"""Of some of the rank's tokens: the teacher's logits [n, V], or its likeliest ids."""


@dataclass(frozen=True)
class Slice:
    """Rows of the vocabulary that a tensor rank holds: `width` of them from `first` on."""

    first: int
    width: int


class Said(Protocol):
    """What a teacher says of one micro-batch."""

    def of(self, batch: Batch, rows: Slice) -> OfTokens:
        """Of this rank's tokens, in the order of `batch["labels"].flatten()`. Collective over TP.

        `batch` is the rank's, with `place` [B, S / CP]: where each token is in the whole
        micro-batch, flattened.
        """


class Distillation:
    """The token mean of a * cross-entropy + (1 - a) * T^2 * divergence.

    Both are of the real vocabulary. Logs the `loss`, `cross_entropy` and `divergence` (at the
    temperature, without T^2), each the mean over the tokens that count, in nats.
    """

    figures = ("loss", "cross_entropy", "divergence")
    tokens_of = "loss"
    has_perplexity = False
    reads = "logits"
    inputs = ("place",)
    carried = (TEACHER,)

    def __init__(self, settings: DistillationConfig) -> None:
        self._mixture = Mixture(
            settings.cross_entropy_weight, settings.temperature, settings.direction
        )

    def weigh(self, batch: Batch) -> float:
        """See Objective. Raises ValueError where no teacher said anything."""
        if TEACHER not in batch:
            raise ValueError("the batch has nothing of a teacher")
        labels = batch["labels"]
        batch["place"] = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return float(batch["loss_mask"].sum())

    def __call__(self, logits: Logits, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """See Objective."""
        values_NV = logits.values.flatten(0, 1)
        width = values_NV.shape[1]
        rows = Slice(logits.tp_group.rank() * width, width)
        losses = distillation_losses(
            values_NV,
            batch["labels"].flatten() - rows.first,
            batch[TEACHER].of(batch, rows),
            mixture=self._mixture,
            real=min(max(logits.vocab_size - rows.first, 0), width),
            across=across_ranks(logits.tp_group),
        )
        mask = batch["loss_mask"].flatten().to(losses.total.dtype)
        count = mask.sum()
        sums = [(values * mask).sum() for values in losses]
        figures = {
            name: (value.detach(), count) for name, value in zip(self.figures, sums, strict=True)
        }
        return ObjectiveOutput(sums[0], figures)


def across_ranks(tp_group: torch.distributed.ProcessGroup) -> Across:
    """Joins the slices of the ranks of `tp_group`, in place: no rank gets another's logits."""
    if tp_group.size() == 1:
        return WHOLE

    def joined(operation: Any) -> Callable[[Tensor], Tensor]:
        def join(values: Tensor) -> Tensor:
            torch.distributed.all_reduce(values, op=operation, group=tp_group)
            return values

        return join

    return Across(joined(torch.distributed.ReduceOp.SUM), joined(torch.distributed.ReduceOp.MAX))

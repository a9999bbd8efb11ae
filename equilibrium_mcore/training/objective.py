"""What a step minimises: a function of the losses per token and the batch.

`HybridModel(labels=...)` returns -log p of every label, in every layout. An objective makes of them
a sum that gradients flow through; what it divides by is known before the step, from the batches of
the whole global batch. One that needs more than labels (a temperature, an entropy, another model's
distribution) reads `logits`, and gets this rank's slice of the logits in their place.

megatron-core is always given positions as `num_tokens`, by which it divides gradients and weighs
the balancing losses; so an objective's sum is scaled by positions / divisor, and the weight of
balancing losses depends on neither the objective nor how many tokens count.

A new objective is a section in `config/objectives.py`, a class, and its row in
`all_objectives.OBJECTIVES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from equilibrium_mcore.models.logprobs import (
    label_log_probabilities,
    log_probabilities_and_entropies,
)
from equilibrium_mcore.models.support import Support
from equilibrium_mcore.objectives.reduction import REDUCTIONS

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Logits:
    """What the output layer made of this rank's tokens: its slice of the padded vocabulary.

    `values`: (B, S / CP, V / TP) or, packed, (1, B * S / CP, V / TP), in the order of the rank's
    batch, of the model's dtype, the vocabulary in the order of the tensor ranks. Ids from
    `vocab_size` on are padding. Gradients to `values` must be those of a sum that is the same on
    all tensor ranks, as those of `models/logprobs.py` are.
    """

    values: Tensor
    vocab_size: int
    tp_group: Any

    def log_probabilities(self, labels_BS: Tensor, *, temperature: float = 1.0) -> Tensor:
        """log p of each label among real ids, in nats, of `labels_BS`' shape. Collective."""
        return label_log_probabilities(self.values, labels_BS, **self._settings(temperature))

    def log_probabilities_and_entropies(
        self,
        labels_BS: Tensor,
        *,
        temperature: float = 1.0,
        support: Support | None = None,
        place_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`log_probabilities`, and the entropy of the distribution that they are of. Collective.

        With a `support`, of the distribution over it, where `place_BS` is each token's place in it.
        """
        settings = self._settings(temperature)
        if support is not None:
            width = self.values.shape[-1]
            first = self.tp_group.rank() * width
            settings["outside_BSV"] = support.outside(place_BS, first=first, width=width)
        return log_probabilities_and_entropies(self.values, labels_BS, **settings)

    def _settings(self, temperature: float) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "tp_group": self.tp_group,
            "temperature": temperature,
        }


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective makes of a micro-batch on one rank.

    `total` is this rank's part of the sum, a scalar. `figures` are (sum, count) by name, scalars,
    of which a step logs the sum over sum of counts of all ranks that hold other tokens.
    """

    total: Tensor
    figures: dict[str, tuple[Tensor, Tensor]]


class Objective(Protocol):
    """The seam: `figures` names what it logs; `loss` is always among them."""

    figures: tuple[str, ...]

    has_perplexity: bool
    """Whether `loss` is the mean -log p per counted token, of which a perplexity is exp."""

    def weigh(self, batch: Batch) -> float:
        """Prepare a whole micro-batch, before CP cuts it; its part of the divisor.

        May add tensors [B, S] to `batch`; those named in `inputs` are cut with the others.
        """

    def __call__(self, losses: Any, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """The sum over this rank's part of the micro-batch.

        losses: (B, S / CP) or, packed, (1, B * S / CP), -log p of each label in nats, padding of
        the vocabulary in the normaliser; where it reads logits, `Logits`. What is not linear in the
        losses of a sequence sums them over `cp_group` first: `summed_over_context`.

        batch: `tokens`, `labels`, `position_ids`, `loss_mask` and `inputs`, cut as the losses are,
        and `carried`.
        """

    tokens_of: str
    """The figure whose count is how many tokens were trained on."""

    reads: Literal["losses", "logits", "values", "both"]
    """What `__call__` is given: -log p of each label, `Logits`, what a scalar head gives, or losses
    and values, [2, B, S / CP]. A model of one head gives its own for all but `logits`."""

    inputs: tuple[str, ...]
    """Names of tensors of the batch that `__call__` needs beside `loss_mask`."""

    carried: tuple[str, ...]
    """Names of what `Run.prepare` put into batches for this rank alone: neither cut nor sent."""


class WeightedTokens:
    """A weighted sum of losses: token mean, sequence mean, constant length.

    Logs `loss`, the mean per counted token in nats, whatever the weights are.
    """

    figures = ("loss",)
    tokens_of = "loss"
    has_perplexity = True
    reads = "losses"
    carried = ()

    def __init__(self, reduction: str = "token_mean", length: int | None = None) -> None:
        self._weights, self._length = REDUCTIONS[reduction], length
        self.inputs = () if reduction == "token_mean" else ("weight",)

    def weigh(self, batch: Batch) -> float:
        """See Objective."""
        weight, divisor = self._weights(batch["loss_mask"], batch["position_ids"], self._length)
        if self.inputs:
            batch["weight"] = weight
        return divisor

    def __call__(self, losses: Tensor, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """See Objective."""
        wide = torch.promote_types(losses.dtype, torch.float32)
        losses = losses.reshape(-1).to(wide)
        mask = batch["loss_mask"].reshape(-1).to(wide)
        total = counted = (losses * mask).sum()
        if self.inputs:
            total = (losses * batch["weight"].reshape(-1).to(wide)).sum()
        return ObjectiveOutput(total, {"loss": (counted.detach(), mask.sum())})


class _SumOverContext(torch.autograd.Function):
    """All-reduce forward, identity backward: each rank's gradient is that of its own tokens."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def summed_over_context(values: Tensor, cp_group: Any) -> Tensor:
    """Sums of sequences of which each CP rank holds a part: before any non-linearity."""
    return values if cp_group.size() == 1 else _SumOverContext.apply(values, cp_group)

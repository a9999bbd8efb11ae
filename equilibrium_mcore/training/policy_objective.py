"""The objective of policies: what `objectives/policy.py` and `objectives/kl.py` say, in any layout.

Advantages and the log-probabilities of before are made outside, of the whole batch; what is
computed here is of each token, and of an answer only the mean of its log ratio.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.models.support import SUPPORT
from equilibrium_mcore.objectives.kl import ESTIMATORS
from equilibrium_mcore.objectives.policy import RATIOS, SURROGATES, Answers
from equilibrium_mcore.objectives.reduction import REDUCTIONS, document_numbers
from equilibrium_mcore.training.objective import Batch, Logits, ObjectiveOutput, summed_over_context
from equilibrium_mcore.training.pairs import REFERENCE

# Of a batch, [B, S], at the positions whose label was produced; what stands elsewhere is not read.
OLD = "old"  # log p by the policy that drew it, from the training forward before any update
ADVANTAGES = "advantages"
CORRECTIONS = "corrections"  # weight for the difference of engine and training


class Policy:
    """A policy gradient with a term that ties to a reference.

    Batches have `old`, `advantages` and `corrections`, and `reference` where the tie is part of the
    loss; with a `support` (`models/support.py`) all probabilities are over it. Logs the loss; the
    mean ratio to the old policy, the share of tokens whose gradient is cut off below and above, and
    `kl_old`, how far the policy is from the old one (k3, in nats per token); the entropy; and with
    a reference, `k1` and `k3` of the divergence from it.

    `temperature` divides the logits, as it did when the answers were drawn. `kl_coefficient` is
    what the term is multiplied by. Who makes the batches may change both.
    """

    tokens_of = "ratio"
    has_perplexity = False
    reads = "logits"
    carried = (SUPPORT,)

    def __init__(self, settings: PolicyConfig, *, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.kl_coefficient = settings.kl.coefficient
        self._weights, self._length = REDUCTIONS[settings.reduction], settings.constant_length
        self._ratio, self._of_answers = RATIOS[settings.ratio], settings.ratio == "sequence"
        bounds = {"low": settings.clip_low, "high": settings.clip_high}
        self._surrogate = partial(SURROGATES[settings.surrogate], **bounds)
        self._tied = settings.needs_reference and settings.kl.place == "loss"
        self._estimate = ESTIMATORS[settings.kl.estimator]
        self.figures = ("loss", "ratio", "clipped_below", "clipped_above", "kl_old", "entropy")
        self.inputs = (OLD, ADVANTAGES, CORRECTIONS, "weight", "share", "place")
        if self._tied:
            self.figures += ("k1", "k3")
            self.inputs += (REFERENCE,)
        if self._of_answers:
            self.inputs += ("document", "documents")

    def weigh(self, batch: Batch) -> float:
        """See Objective. Raises ValueError for a batch that lacks what `inputs` names."""
        missing = [n for n in (OLD, ADVANTAGES, CORRECTIONS, REFERENCE) if n in self.inputs]
        missing = [name for name in missing if name not in batch]
        if missing:
            raise ValueError(f"the batch of a policy lacks {', '.join(missing)}")
        mask, positions = batch["loss_mask"], batch["position_ids"]
        batch.setdefault(SUPPORT, None)
        batch["place"] = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        batch["weight"], divisor = self._weights(mask, positions, self._length)
        total = float(batch["weight"].sum())
        batch["share"] = batch["weight"] * (divisor / total if total else 0.0)
        if self._of_answers:
            batch["document"] = document_numbers(positions)
            batch["documents"] = torch.full_like(positions, int(batch["document"].max()) + 1)
        return divisor

    def __call__(self, logits: Logits, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """See Objective."""
        log_p, entropy = logits.log_probabilities_and_entropies(
            batch["labels"],
            temperature=self.temperature,
            support=batch[SUPPORT],
            place_BS=batch["place"],
        )
        log_p = log_p.reshape(-1)
        flat = {name: batch[name].reshape(-1) for name in ("loss_mask", *self.inputs)}
        mask = flat["loss_mask"].to(log_p.dtype)
        counts = mask > 0

        def of(name: str) -> Tensor:  # where nothing was produced: what changes nothing
            nothing = log_p.detach() if name in (OLD, REFERENCE) else torch.zeros_like(log_p)
            return torch.where(counts, flat[name].to(log_p.dtype), nothing)

        answers = None
        if self._of_answers:
            summed = partial(summed_over_context, cp_group=cp_group)
            count = int(batch["documents"].max())
            answers = Answers(mask, flat["document"], count, summed)
        old = of(OLD)
        log_ratio = self._ratio(log_p, old, answers)
        losses, below, above = self._surrogate(log_ratio, log_p, of(ADVANTAGES))
        losses = losses * of(CORRECTIONS)
        seen: dict[str, Tensor] = {}
        if self._tied:
            reference = of(REFERENCE)
            losses = losses + self.kl_coefficient * self._estimate(log_p, reference, old)
            now = log_p.detach()
            seen = {k: ESTIMATORS[k](now, reference, old) for k in ("k1", "k3")}
        total = (losses * flat["weight"].to(log_p.dtype)).sum()
        moved = (log_p - old).detach()
        seen |= {
            "ratio": log_ratio.detach().exp(),
            "clipped_below": below.to(log_p.dtype),
            "clipped_above": above.to(log_p.dtype),
            "kl_old": torch.expm1(moved) - moved,
            "entropy": entropy.detach().reshape(-1),
        }
        tokens = mask.sum()
        figures = {name: ((values * mask).sum(), tokens) for name, values in seen.items()}
        figures["loss"] = (total.detach(), flat["share"].to(log_p.dtype).sum())
        return ObjectiveOutput(total, figures)

"""The objective of single answers, desirable or not: KTO."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.config.objectives import KtoConfig
from equilibrium_mcore.objectives.unpaired import kto
from equilibrium_mcore.training.objective import Batch, ObjectiveOutput
from equilibrium_mcore.training.pairs import REFERENCE, number_answers, sums_of_answers

DESIRABLE = "desirable"  # of a batch: 1 at the positions of a desirable answer
KL = "kl"  # of a batch: z, everywhere; and the figure


class Kto:
    """The mean of KTO's loss over the answers of the global batch.

    Batches have `answer` and `desirable` [B, S], as `UnpairedDataset` makes them, `reference`, and
    `kl`, which `training.mismatched` makes. Logs the loss; `nll`, -log p per token of desirable
    answers; `kl`; and the mean rewards, beta times the log ratio, of both kinds of answers.
    """

    figures = ("loss", "nll", "kl", "desirable_reward", "undesirable_reward")
    tokens_of = "nll"
    has_perplexity = False
    reads = "losses"
    carried = ()
    inputs = ("answer", "answers", DESIRABLE, REFERENCE, KL)

    def __init__(self, settings: KtoConfig) -> None:
        self._beta = settings.beta
        self._loss = partial(
            kto,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )

    def weigh(self, batch: Batch) -> float:
        """See Objective: the number of answers. Raises ValueError where nothing prepared them."""
        for name in (REFERENCE, KL):
            if name not in batch:
                raise ValueError(f"the batch has no {name!r}, which a stage's preparation makes")
        return float(number_answers(batch))

    def __call__(self, losses: Tensor, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """See Objective."""
        wide = torch.promote_types(losses.dtype, torch.float32)
        answer = batch["answer"].reshape(-1)
        log_p = -losses.reshape(-1).to(wide)
        ratio = log_p - batch[REFERENCE].reshape(-1).to(wide)
        desirable = batch[DESIRABLE].reshape(-1).to(wide)
        z = batch[KL].reshape(-1)[0].to(wide)
        sums = sums_of_answers([ratio, desirable], answer, batch=batch, cp_group=cp_group)
        ratios, is_desirable = sums[:, 0], sums[:, 1] > 0
        loss = self._loss(ratios, is_desirable, z)
        ways = cp_group.size()  # every context rank has all answers
        here = (answer > 0).to(wide) * desirable

        def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
            return values.detach().sum() / ways, values.new_tensor(len(values) / ways)

        rewards = self._beta * ratios
        figures = {
            "loss": mean_of(loss),
            "nll": (-(log_p * here).sum().detach(), here.sum()),
            KL: mean_of(z.expand(len(loss))),
            "desirable_reward": mean_of(rewards[is_desirable]),
            "undesirable_reward": mean_of(rewards[~is_desirable]),
        }
        return ObjectiveOutput(loss.sum(), figures)

"""Objectives of pairs: a loss of the sums over answers, which context ranks hold in parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.config.objectives import DpoConfig, IpoConfig, OrpoConfig, SimpoConfig
from equilibrium_mcore.objectives.preference import Answers, dpo, ipo, orpo, simpo
from equilibrium_mcore.training.objective import (
    Batch,
    ObjectiveOutput,
    summed_over_context,
)

REFERENCE = "reference"  # of a batch: log p of each label by the reference, [B, S]
PairLoss = Callable[[Answers, Answers | None], Tensor]
Reward = Callable[[Answers, Answers | None], tuple[Tensor, Tensor]]


class Pairs:
    """The mean of a loss over the pairs of the global batch.

    Batches have `answer` [B, S], as `data.chat.preferences.PreferenceDataset` makes it, and
    `reference` where the loss needs one. Logs the loss; `nll`, -log p per token of the chosen
    answers; and of the pairs `accuracy`, the share whose chosen answer has the larger reward,
    `margin`, by how much, and both rewards.
    """

    figures = ("loss", "nll", "accuracy", "margin", "chosen_reward", "rejected_reward")
    tokens_of = "nll"
    has_perplexity = False
    reads = "losses"
    carried = ()

    def __init__(self, loss: PairLoss, reward: Reward, *, needs_reference: bool) -> None:
        self._loss, self._reward, self.needs_reference = loss, reward, needs_reference
        self.inputs = ("answer", "answers", *((REFERENCE,) if needs_reference else ()))

    def weigh(self, batch: Batch) -> float:
        """Number the pairs over all rows. Raises ValueError where a reference is missing."""
        if self.needs_reference and REFERENCE not in batch:
            raise ValueError("the batch has no log-probabilities of a reference")
        return number_answers(batch) / 2

    def __call__(self, losses: Tensor, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """See Objective."""
        wide = torch.promote_types(losses.dtype, torch.float32)
        log_p, answer = -losses.reshape(-1).to(wide), batch["answer"].reshape(-1)
        ones = torch.ones_like(log_p)
        values = [log_p, ones]
        if self.needs_reference:
            values.append(batch[REFERENCE].reshape(-1).to(wide))
        sums = sums_of_answers(values, answer, batch=batch, cp_group=cp_group)
        sums = sums.view(len(sums) // 2, 2, len(values))  # there may be none
        policy = _answers(sums, 0)
        reference = _answers(sums, 2) if self.needs_reference else None
        loss = self._loss(policy, reference)
        chosen_here = (answer % 2 == 1).to(wide)
        figures = {"nll": (-(log_p * chosen_here).sum().detach(), chosen_here.sum())}
        with torch.no_grad():
            chosen, rejected = self._reward(policy, reference)
            of_pairs = {
                "loss": loss,
                "accuracy": (chosen > rejected).to(wide),
                "margin": chosen - rejected,
                "chosen_reward": chosen,
                "rejected_reward": rejected,
            }
            ways = cp_group.size()  # every context rank has all pairs
            pairs = log_p.new_tensor(len(loss) / ways)
            figures |= {name: (v.detach().sum() / ways, pairs) for name, v in of_pairs.items()}
        return ObjectiveOutput(loss.sum(), figures)


def number_answers(batch: Batch) -> int:
    """Number `answer` through over all rows, and put how many there are into `answers` [B, S]."""
    answer_BS = batch["answer"]
    count_B = answer_BS.amax(dim=1)
    before_B = count_B.cumsum(0) - count_B
    batch["answer"] = torch.where(answer_BS > 0, answer_BS + before_B[:, None], 0)
    batch["answers"] = torch.full_like(answer_BS, int(count_B.sum()))
    return int(count_B.sum())


def sums_of_answers(values: list[Tensor], answer: Tensor, *, batch: Batch, cp_group: Any) -> Tensor:
    """Sums of `values`, each [tokens], over every answer of the micro-batch: [answers, values].

    answer: [tokens], 0 where nothing counts. The same on all context ranks. Collective.
    """
    count = int(batch["answers"].max())
    sums = values[0].new_zeros(count + 1, len(values))
    sums = sums.index_add(0, answer, torch.stack(values, dim=1))
    return summed_over_context(sums, cp_group)[1:]


def _answers(sums: Tensor, place: int) -> Answers:
    return Answers(sums[:, 0, place], sums[:, 1, place], sums[:, 0, 1], sums[:, 1, 1])


def _of_sums(policy: Answers, reference: Answers | None, *, beta: float) -> tuple[Tensor, Tensor]:
    """DPO's implicit rewards, up to a constant of the prompt."""
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


def _of_means(policy: Answers, reference: Answers | None, *, beta: float) -> tuple[Tensor, Tensor]:
    return beta * policy.mean_chosen, beta * policy.mean_rejected


def _dpo(settings: DpoConfig) -> Pairs:
    loss = partial(dpo, beta=settings.beta, label_smoothing=settings.label_smoothing)
    return Pairs(loss, partial(_of_sums, beta=settings.beta), needs_reference=True)


def _ipo(settings: IpoConfig) -> Pairs:
    loss = partial(ipo, beta=settings.beta)
    return Pairs(loss, partial(_of_sums, beta=settings.beta), needs_reference=True)


def _simpo(settings: SimpoConfig) -> Pairs:
    def loss(policy: Answers, reference: Answers | None) -> Tensor:
        return simpo(policy, beta=settings.beta, gamma=settings.gamma)

    return Pairs(loss, partial(_of_means, beta=settings.beta), needs_reference=False)


def _orpo(settings: OrpoConfig) -> Pairs:
    def loss(policy: Answers, reference: Answers | None) -> Tensor:
        return orpo(policy, beta=settings.beta)

    return Pairs(loss, partial(_of_means, beta=settings.beta), needs_reference=False)


PAIR_OBJECTIVES: dict[type, Callable[[Any], Pairs]] = {
    DpoConfig: _dpo,
    IpoConfig: _ipo,
    SimpoConfig: _simpo,
    OrpoConfig: _orpo,
}

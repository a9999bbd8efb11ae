"""What an answer was worth beyond what was expected of it: a baseline taken off, then a scale.

Statistics are of the whole batch of rollouts and in float64, computed once before it is cut into
micro-batches, so that no layout or micro-batch has a mean of its own. Shapes: R answers.

    group          R - mean of the answers to the same prompt                      arXiv 2402.03300
    leave_one_out  R - mean of the other answers to it                             arXiv 2402.14740
    batch          R - mean of all answers
    tracker        R - what a tracker expected of the prompt (`objectives/trackers.py`)

and divided by

    none           nothing                                                         arXiv 2503.20783
    std            the standard deviation of the answers to the same prompt        arXiv 2402.03300
    batch          that of the whole batch, after its mean is taken off            arXiv 2509.13232

Equal rewards give exactly 0, whatever their rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4  # beside a standard deviation, as trl has it: noise of 1e-8 stays small


@dataclass(frozen=True)
class Scores:
    """Rewards [R], the prompt that each is of as a number from 0 on [R], and expectations [R]."""

    rewards: Tensor
    prompts: Tensor
    baselines: Tensor | None = None

    @property
    def wide(self) -> Tensor:
        """The rewards in float64."""
        return self.rewards.double()

    def counts(self) -> Tensor:
        """For each answer, how many there are to its prompt. float64 [R]."""
        return self._spread(torch.ones_like(self.wide))

    def prompt_means(self) -> Tensor:
        """For each answer, the mean reward of its prompt. float64 [R]."""
        return self._spread(self.wide) / self.counts()

    def alike(self) -> Tensor:
        """For each answer, whether all answers to its prompt have one reward. bool [R]."""
        size = int(self.prompts.max()) + 1
        ends = [
            self.wide.new_zeros(size).scatter_reduce_(
                0, self.prompts, self.wide, way, include_self=False
            )
            for way in ("amin", "amax")
        ]
        return (ends[0] == ends[1])[self.prompts]

    def _spread(self, values: Tensor) -> Tensor:
        """Sums over the answers to a prompt, at each of them."""
        sums = values.new_zeros(int(self.prompts.max()) + 1)
        return sums.index_add_(0, self.prompts, values)[self.prompts]


def group(scores: Scores) -> Tensor:
    """Reward less the mean of the answers to the same prompt."""
    return torch.where(scores.alike(), 0.0, scores.wide - scores.prompt_means())


def leave_one_out(scores: Scores) -> Tensor:
    """Reward less the mean of the other answers to the prompt; 0 where there are none."""
    counts = scores.counts()
    return group(scores) * counts / (counts - 1).clamp(min=1)


def batch(scores: Scores) -> Tensor:
    """Reward less the mean of all answers."""
    return _centred(scores.wide)


def tracker(scores: Scores) -> Tensor:
    """Reward less what the tracker expected before it saw the reward."""
    if scores.baselines is None:
        raise ValueError("advantage tracker needs the baselines of a tracker")
    return scores.wide - scores.baselines.double()


BASELINES: dict[str, Callable[[Scores], Tensor]] = {
    "group": group,
    "leave_one_out": leave_one_out,
    "batch": batch,
    "tracker": tracker,
}
"""Scores -> rewards without what was expected, float64 [R]."""


def _by_prompt(values: Tensor, scores: Scores) -> Tensor:
    variance = scores._spread((scores.wide - scores.prompt_means()).square())
    deviation = (variance / (scores.counts() - 1).clamp(min=1)).sqrt()
    return torch.where(scores.alike(), 0.0, values / (deviation + EPSILON))


SCALES: dict[str, Callable[[Tensor, Scores], Tensor]] = {
    "none": lambda values, scores: values,
    "std": _by_prompt,
    "batch": lambda values, scores: whitened(values),
}


def advantages(
    scores: Scores, *, baseline: str, scale: str = "none", bound: float | None = None
) -> Tensor:
    """The advantage of each answer of the whole batch, float64 [R].

    `baseline` and `scale` are named above; `bound` cuts what is larger in size.
    """
    values = SCALES[scale](BASELINES[baseline](scores), scores)
    return values if bound is None else values.clamp(-bound, bound)


def whitened(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all values, which must be the whole batch's. float64."""
    centred = _centred(values.double())
    if len(values) < 2:
        return centred
    return centred / (centred.square().sum() / (len(values) - 1)).sqrt().add(1e-8)


def teachers(teacher_log_p: Tensor, old_log_p: Tensor) -> Tensor:
    """On-policy distillation: each token's log p by the teacher less that by the policy (nats).

    Its policy gradient is that of the reverse KL of each token given those before it.
    """
    return teacher_log_p.double() - old_log_p.double()


def dead_prompts(scores: Scores) -> float:
    """The share of prompts with several answers of which all have one reward: nothing to learn."""
    several = scores.counts() > 1
    if not several.any():
        return 0.0
    of_prompts = 1 / scores.counts()
    return float(of_prompts[several & scores.alike()].sum() / of_prompts[several].sum())


def _centred(values: Tensor) -> Tensor:
    """Less the mean; exactly 0 where all are equal."""
    alike = len(values) > 0 and bool((values == values[0]).all())
    return torch.zeros_like(values) if alike else values - values.mean()

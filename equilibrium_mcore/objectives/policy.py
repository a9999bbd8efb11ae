"""Losses of the policy gradient per token: a ratio to the policy that drew it, and a surrogate.

A ratio is that of the trained policy to the old one, from before the first update on a batch:

    token     p / p_old                                                     arXiv 1707.06347
    sequence  its geometric mean over the answer, the same at each of its tokens    arXiv 2507.18071
    none      1, with the gradient of log p

and a surrogate is

    clip      -min(ratio A, clip(ratio, 1 - low, 1 + high) A)                    arXiv 1707.06347
    cispo     -stop(clip(ratio, 1 - low, 1 + high)) A log p                      arXiv 2506.13585

`none` with `cispo` is REINFORCE, -A log p. `sequence` is GSPO in its form per token, whose gradient
is GSPO's where the advantages of an answer are equal: a token's own log p carries the gradient, and
so ranks that hold parts of an answer need its sums alone, and not their gradients.

Shapes: N tokens of answers, of any number of documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """Whose tokens these are: `mask` 1 where produced [N], `numbers` of answers int64 [N].

    `summed` adds what other ranks hold of the same `count` answers.
    """

    mask: Tensor
    numbers: Tensor
    count: int
    summed: Callable[[Tensor], Tensor] = lambda values: values

    @torch.no_grad()
    def means(self, values: Tensor) -> Tensor:
        """The mean over the produced tokens of each answer, at each of its tokens. [N]."""
        both = torch.stack([torch.where(self.mask > 0, values, 0.0), self.mask], dim=1)
        sums = self.summed(both.new_zeros(self.count, 2).index_add_(0, self.numbers, both))
        return (sums[:, 0] / sums[:, 1].clamp(min=1))[self.numbers]


def token(log_p: Tensor, old: Tensor, answers: Answers) -> Tensor:
    """Of each token by itself."""
    return log_p - old


def sequence(log_p: Tensor, old: Tensor, answers: Answers) -> Tensor:
    """The mean over the answer, with the gradient of the token's own."""
    return answers.means(log_p.detach() - old) + (log_p - log_p.detach())


def none(log_p: Tensor, old: Tensor, answers: Answers) -> Tensor:
    """0, with the gradient of log p."""
    return log_p - log_p.detach()


RATIOS: dict[str, Callable[[Tensor, Tensor, Answers], Tensor]] = {
    "token": token,
    "sequence": sequence,
    "none": none,
}
"""(log_p, old, answers) -> logarithms of the ratios, [N]."""


class Surrogate(NamedTuple):
    """Losses [N], and where the bound below or above cut the gradient off, bool [N]."""

    losses: Tensor
    below: Tensor
    above: Tensor


def clip(
    log_ratio: Tensor, log_p: Tensor, advantages: Tensor, *, low: float, high: float
) -> Surrogate:
    """PPO's: no gain from a ratio that has moved far enough."""
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    losses = -torch.minimum(ratio * advantages, bounded * advantages)
    below, above = ratio < 1 - low, ratio > 1 + high
    return Surrogate(losses, below & (advantages < 0), above & (advantages > 0))


def cispo(
    log_ratio: Tensor, log_p: Tensor, advantages: Tensor, *, low: float, high: float
) -> Surrogate:
    """Every token keeps a gradient, of which only the weight is bounded."""
    ratio = log_ratio.detach().exp()
    losses = -ratio.clamp(1 - low, 1 + high) * advantages * log_p
    return Surrogate(losses, ratio < 1 - low, ratio > 1 + high)


SURROGATES: dict[str, Callable[..., Surrogate]] = {"clip": clip, "cispo": cispo}
"""(log_ratio, log_p, advantages, low=, high=) -> Surrogate."""

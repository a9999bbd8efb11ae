"""Advantages and losses of a critic's values.

Shapes: N positions of any number of answers, in the order of the text. A value belongs to the
position at which the next token is drawn; what is not produced has none, and is passed over, so
that tokens of a tool or another document between two produced ones neither earn nor discount.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimates(NamedTuple):
    """Advantages, and the returns that values are fitted to; float64 [N], 0 where not produced."""

    advantages: Tensor
    returns: Tensor


def token_rewards(
    scores: Tensor, mask: Tensor, answers: Tensor, *, penalties: Tensor | None = None
) -> Tensor:
    """Each answer's score at its last produced token, less `penalties` at every one. float64 [N].

    Args:
        scores: [R], one for each answer.
        mask: [N], above 0 where produced.
        answers: int64 [N], the answer of each position.
        penalties: [N], e.g. a coefficient times k1.
    """
    rewards = torch.zeros(len(mask), dtype=torch.float64)
    if penalties is not None:
        rewards = torch.where(mask > 0, -penalties.double(), 0.0)
    places = (mask > 0).nonzero().flatten()
    last = torch.full((len(scores),), -1, dtype=torch.int64)
    last.scatter_reduce_(0, answers[places], places, "amax")
    if (last < 0).any():
        raise ValueError(f"answer {int((last < 0).nonzero()[0])} has no produced token")
    return rewards.index_add_(0, last, scores.double())


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    answers: Tensor,
    *,
    bootstraps: Tensor,
    gamma: float = 1.0,
    trace_decay: float = 0.95,
) -> Estimates:
    """Generalised advantage estimation over produced tokens alone (arXiv 1506.02438).

    d_t = R_t + gamma V_{t+1} - V_t and A_t = d_t + gamma * trace_decay * A_{t+1}, with t over the
    produced tokens of one answer.

    Args:
        rewards, values, mask, answers: [N]; answers are numbered from 0, each in one run.
        bootstraps: [R], the value after an answer's last token: 0 where it ended by itself, the
            critic's where it was cut off at a length.
        trace_decay: lambda.
    """
    produced = mask > 0
    number = answers[produced]
    counts = torch.bincount(number, minlength=len(bootstraps))
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(number)) - starts[number]
    width = int(counts.max()) if len(number) else 0

    def table(flat: Tensor) -> Tensor:
        return torch.zeros(len(counts), width, dtype=torch.float64).index_put_(
            (number, column), flat[produced].double()
        )

    reward, value = table(rewards), table(values)
    found = torch.zeros_like(value)
    following, advantage = bootstraps.double(), torch.zeros(len(counts), dtype=torch.float64)
    for t in reversed(range(width)):
        there = t < counts
        delta = reward[:, t] + gamma * following - value[:, t]
        advantage = torch.where(there, delta + gamma * trace_decay * advantage, advantage)
        following = torch.where(there, value[:, t], following)
        found[:, t] = advantage
    result = torch.zeros(len(mask), dtype=torch.float64)
    result[produced] = found[number, column]
    returns = torch.where(produced, result + torch.where(produced, values.double(), 0.0), 0.0)
    return Estimates(result, returns)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Half the squared error, or that of the value kept within `clip` of the old, if larger."""
    loss = (values - returns).square()
    if clip is not None:
        near = torch.minimum(torch.maximum(values, old - clip), old + clip)
        loss = torch.maximum(loss, (near - returns).square())
    return loss / 2


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - variance of the errors / variance of the returns, over produced tokens [N].

    1 is a perfect critic, 0 one that knows the mean alone; 0 where returns do not vary.
    """
    returns, errors = returns.double(), returns.double() - values.double()
    if len(returns) < 2 or bool((returns == returns[0]).all()):
        return 0.0
    return float(1 - errors.var() / returns.var())

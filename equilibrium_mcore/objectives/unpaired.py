"""KTO: the loss of single answers, each desirable or not, arXiv 2402.01306.

    r = log p - log p of the reference, summed over an answer's tokens
    z = max(0, mean of r over mismatched answers), without a gradient
    desirable     l_D (1 - s(beta (r - z)))
    undesirable   l_U (1 - s(beta (z - r)))

s is the logistic function. A mismatched answer is one to another prompt; z estimates the KL
divergence of the policy from its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    ratios: Tensor,
    desirable: Tensor,
    z: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """One value an answer, [A].

    Args:
        ratios: r of every answer, [A].
        desirable: bool [A].
        z: scalar, or one value for each answer.
    """
    share = desirable.to(ratios.dtype)  # 1 or 0
    sign = 2 * share - 1
    weight = desirable_weight * share + undesirable_weight * (1 - share)
    return weight * (1 - torch.sigmoid(beta * sign * (ratios - z)))

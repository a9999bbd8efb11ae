"""The difference between the distribution that drew a token and the one that trains on it.

An engine and the training forward round differently; the weight old / sampled corrects for it, and
is bounded, since it is noise where it is large. Tensors of one shape, in nats; no gradient flows.

    none      1
    truncate  min(old / sampled, high)                       (truncated importance sampling)
    mask      old / sampled, and 0 outside of [low, high]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def none(old: Tensor, sampled: Tensor, low: float, high: float) -> Tensor:
    """Every token weighs 1."""
    return torch.ones_like(old)


def truncate(old: Tensor, sampled: Tensor, low: float, high: float) -> Tensor:
    """The ratio, at most `high`."""
    return torch.exp(old - sampled).clamp(max=high).detach()


def mask(old: Tensor, sampled: Tensor, low: float, high: float) -> Tensor:
    """The ratio; a token outside of the bounds is left out, and stays in the divisor."""
    ratio = torch.exp(old - sampled).detach()
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


CORRECTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "none": none,
    "truncate": truncate,
    "mask": mask,
}
"""(old, sampled, low, high) -> weights of tokens."""


@dataclass(frozen=True)
class Mismatch:
    """Of log(old / sampled) over produced tokens: mean and largest size, and k3 of their KL."""

    mean: float
    largest: float
    k3: float


def mismatch(old: Tensor, sampled: Tensor) -> Mismatch:
    """What all produced tokens of a batch say, [N] each; zeros without any."""
    if not old.numel():
        return Mismatch(0.0, 0.0, 0.0)
    difference = old.double() - sampled.double()
    size, k3 = difference.abs(), torch.expm1(difference) - difference
    return Mismatch(float(size.mean()), float(size.max()), float(k3.mean()))

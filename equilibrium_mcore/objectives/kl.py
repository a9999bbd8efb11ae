"""Estimates of KL(policy || reference) from tokens that the policy drew, and their coefficient.

With r = log p - log p of the reference, of one token each, in nats:

    k1        r                                    as a cost in the reward: the exact gradient
    k2        r^2 / 2                              in the loss: the exact gradient
    k3        exp(-r) - 1 + r                      in the loss: the gradient of KL(reference || p)
    ratio_k3  k3 times p / p of the old policy     in the loss: the exact gradient

(Schulman, "Approximating KL divergence"; arXiv 2512.21852; tests/objectives/test_enumerated.py sums
over all outcomes.) k1 in the loss has an expected gradient of 0, and k2 or k3 in the reward another
gradient: `PLACES` has what is of use. In the loss, a term holds what its own token adds, given
those before it; in the reward, a token also answers for what follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


def k1(log_p: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """The log ratio."""
    return log_p - reference


def k2(log_p: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """Half its square."""
    return (log_p - reference).square() / 2


def k3(log_p: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """Never negative, and of little variance."""
    return torch.expm1(reference - log_p) - (reference - log_p)


def ratio_k3(log_p: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """k3, weighted by p / p of the old policy, whose gradient counts too."""
    return torch.exp(log_p - old) * k3(log_p, reference, old)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "ratio_k3": ratio_k3,
}
"""(log_p, reference, old) -> the estimate, each of one shape, in nats."""

PLACES: dict[str, tuple[str, ...]] = {"reward": ("k1",), "loss": ("k2", "k3", "ratio_k3")}
"""Where each estimator is of use."""


def penalised(rewards: Tensor, divergences: Tensor, *, coefficient: float) -> Tensor:
    """Rewards of answers [R] less the sums of k1 over their tokens [R]. float64."""
    return rewards.double() - coefficient * divergences.double()


class Coefficient(Protocol):
    """What the divergence is multiplied by; a step may change it."""

    value: float

    def update(self, divergence: float, *, answers: int) -> None:
        """Look at a step's mean KL per token, in nats, of so many answers."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load(self, state: dict[str, Any]) -> None:
        """The coefficient as it was."""


class Fixed:
    """The coefficient that was set."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, divergence: float, *, answers: int) -> None:
        """See Coefficient."""

    def state(self) -> dict[str, Any]:
        """See Coefficient."""
        return {"value": self.value}

    def load(self, state: dict[str, Any]) -> None:
        """See Coefficient."""
        self.value = float(state["value"])


class Adaptive(Fixed):
    """Grows where the divergence is above `target`, in proportion (arXiv 1909.08593, 2.2).

    The relative error counts up to 0.2; `horizon` is in answers.
    """

    def __init__(self, value: float, *, target: float, horizon: float) -> None:
        super().__init__(value)
        self._target, self._horizon = target, horizon

    def update(self, divergence: float, *, answers: int) -> None:
        """See Coefficient."""
        error = min(max(divergence / self._target - 1, -0.2), 0.2)
        self.value *= 1 + error * answers / self._horizon

"""What a prompt is expected to earn, from what was earned before: the baseline of SPO.

A tracker holds Beta(a, b) distributions of rewards on a scale from 0 to 1; its expectation is
a / (a + b). A visit forgets a share of the past, the more the further the policy has moved, then
adds the reward. Two forms by name:

    prompt  one for each prompt                                                     arXiv 2509.13232
    single  one for all, as in MiniMind's train_spo.py at 42a4e8c
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Tracker(Protocol):
    """Baselines in the rewards' own units, between `low` and `high`."""

    def baselines(self, keys: Sequence[int]) -> Tensor:
        """What each prompt is expected to earn, float64 [R]; asked before `update`."""

    def update(self, keys: Sequence[int], rewards: Tensor, *, log_p: float, drift: float) -> None:
        """Learn what the answers of a step to these prompts earned, [R].

        `log_p`: mean log p of the step's produced tokens by the policy that drew them. `drift`: KL
        per token, in nats, that the policy moved since the last call.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values, the same on every rank."""

    def load(self, state: dict[str, Any]) -> None:
        """The tracker as it was."""


class PromptTracker:
    """The paper's: a prompt's past fades with the divergence since it was last visited.

    The paper measures that divergence from the policy that visited the prompt last; here it is the
    sum of what each step moved since then, which needs no old policy. A prompt that was never
    visited is expected to earn `prior`, with the weight 1 / (1 - keep_least).
    """

    def __init__(
        self,
        *,
        low: float = 0.0,
        high: float = 1.0,
        half_life: float = 0.06,
        keep_least: float = 0.875,
        keep_most: float = 0.96,
        prior: float = 0.5,
    ) -> None:
        self._low, self._high, self._half_life = low, high, half_life
        self._keep_least, self._keep_most = keep_least, keep_most
        weight = 1 / (1 - keep_least)
        self._new = (weight * prior, weight * (1 - prior))
        self._moved = 0.0
        self._prompts: dict[int, tuple[float, float, float]] = {}  # a, b, moved at the last visit

    def expectation(self, key: int) -> float:
        """a / (a + b) of a prompt."""
        a, b = self._prompts[key][:2] if key in self._prompts else self._new
        return a / (a + b)

    def baselines(self, keys: Sequence[int]) -> Tensor:
        """See Tracker."""
        found = torch.tensor([self.expectation(key) for key in keys], dtype=torch.float64)
        return self._low + (self._high - self._low) * found

    def priorities(self, keys: Sequence[int], *, floor: float = 0.05) -> Tensor:
        """How much a visit would teach: the standard deviation v (1 - v), plus `floor`. [R]."""
        values = torch.tensor([self.expectation(key) for key in keys], dtype=torch.float64)
        return (values * (1 - values)).clamp(min=0).sqrt() + floor

    def update(self, keys: Sequence[int], rewards: Tensor, *, log_p: float, drift: float) -> None:
        """See Tracker. Several answers to one prompt count as one visit that earned their mean."""
        shares = (rewards.double() - self._low) / (self._high - self._low)
        if bool(((shares < 0) | (shares > 1)).any()):
            raise ValueError(
                f"rewards from {float(rewards.min()):g} to {float(rewards.max()):g}, but the "
                f"tracker's are {self._low:g} to {self._high:g}: set tracker.low and tracker.high"
            )
        self._moved += drift
        by_key: dict[int, list[float]] = {}
        for key, share in zip(keys, shares.tolist(), strict=True):
            by_key.setdefault(key, []).append(share)
        for key, earned in by_key.items():
            mean = math.fsum(earned) / len(earned)
            a, b, moved = self._prompts.get(key, (*self._new, self._moved))
            keep = 2 ** (-(self._moved - moved) / self._half_life)
            keep = min(max(keep, self._keep_least), self._keep_most)
            self._prompts[key] = (keep * a + mean, keep * b + 1 - mean, self._moved)

    def state(self) -> dict[str, Any]:
        """See Tracker."""
        prompts = [[key, *values] for key, values in sorted(self._prompts.items())]
        return {"moved": self._moved, "prompts": prompts}

    def load(self, state: dict[str, Any]) -> None:
        """See Tracker."""
        self._moved = float(state["moved"])
        self._prompts = {int(key): (a, b, moved) for key, a, b, moved in state["prompts"]}


class SingleTracker:
    """MiniMind's: the past fades with the change of the mean log p of what was drawn."""

    FIRST_KEEP = 0.9  # where there is no log p of before

    def __init__(
        self,
        *,
        low: float = -3.0,
        high: float = 3.0,
        half_life: float = 0.06,
        keep_least: float = 0.5,
        keep_most: float = 0.96,
        prior: float = 0.5,
    ) -> None:
        self._low, self._high, self._half_life = low, high, half_life
        self._keep_least, self._keep_most = keep_least, keep_most
        weight = 1 / (1 - keep_least)
        self._a, self._b = weight * prior, weight * (1 - prior)
        self._log_p: float | None = None

    def baselines(self, keys: Sequence[int]) -> Tensor:
        """See Tracker."""
        value = self._low + (self._high - self._low) * self._a / (self._a + self._b)
        return torch.full((len(keys),), value, dtype=torch.float64)

    def update(self, keys: Sequence[int], rewards: Tensor, *, log_p: float, drift: float) -> None:
        """See Tracker."""
        keep = self.FIRST_KEEP
        if self._log_p is not None:
            keep = 2 ** (-abs(self._log_p - log_p) / self._half_life)
            keep = min(max(keep, self._keep_least), self._keep_most)
        self._log_p = log_p
        mean = float(((rewards.double() - self._low) / (self._high - self._low)).mean())
        self._a, self._b = keep * self._a + mean, keep * self._b + 1 - mean

    def state(self) -> dict[str, Any]:
        """See Tracker."""
        return {"a": self._a, "b": self._b, "log_p": self._log_p}

    def load(self, state: dict[str, Any]) -> None:
        """See Tracker."""
        self._a, self._b, self._log_p = float(state["a"]), float(state["b"]), state["log_p"]


TRACKERS: dict[str, type] = {"prompt": PromptTracker, "single": SingleTracker}

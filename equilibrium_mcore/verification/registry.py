"""Rewards by their `type`: what judges a text, built from settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from equilibrium_mcore.config.rewards import parse_rewards
from equilibrium_mcore.verification.code_tests import CodeTests
from equilibrium_mcore.verification.form import FormatReward, LengthReward
from equilibrium_mcore.verification.math_answer import MathAnswer
from equilibrium_mcore.verification.plugin import Plugin
from equilibrium_mcore.verification.scored import Example, Part


class Reward(Protocol):
    """What judges a text. `notes` are what a user should know of how it was built."""

    name: str
    notes: Sequence[str]

    def score(self, example: Example) -> Part:
        """The reward of one text. Raises RewardError for what is wrong with the reward itself."""
        ...


# Judged where they are asked for: they cost less than a message.
AT_ONCE = ("format", "length")
BUILDERS: dict[str, Callable[[Any], Reward]] = {
    "math_answer": MathAnswer,
    "code_tests": CodeTests,
    "format": FormatReward,
    "length": LengthReward,
    "plugin": Plugin,
}


def build_reward(config: Any) -> Reward:
    """The reward of a section. Raises RewardError, ImportError or OSError for what is missing."""
    return BUILDERS[config.type](config)


def build_rewards(values: Sequence[Mapping[str, Any]]) -> list[Reward]:
    """The rewards of settings that travelled as plain values."""
    return [build_reward(config) for config in parse_rewards(list(values)).rewards]

"""The objectives by their settings: a row for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equilibrium_mcore.config.objectives import NextTokenConfig, SftConfig
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.training.objective import Objective, WeightedTokens
from equilibrium_mcore.training.pairs import PAIR_OBJECTIVES
from equilibrium_mcore.training.policy_objective import Policy

OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    NextTokenConfig: lambda settings: WeightedTokens(),
    SftConfig: lambda settings: WeightedTokens(settings.reduction, settings.constant_length),
    **PAIR_OBJECTIVES,
    PolicyConfig: Policy,
}


def build_objective(settings: Any) -> Objective:
    """The objective that the settings name."""
    return OBJECTIVES[type(settings)](settings)

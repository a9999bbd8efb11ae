"""The objectives by their settings: a row for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equilibrium_mcore.config.objectives import (
    DistillationConfig,
    KtoConfig,
    NextTokenConfig,
    RewardModelConfig,
    SftConfig,
)
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.training.distillation import Distillation
from equilibrium_mcore.training.objective import Objective, WeightedTokens
from equilibrium_mcore.training.pairs import PAIR_OBJECTIVES
from equilibrium_mcore.training.policy_objective import Policy
from equilibrium_mcore.training.scores import Scores
from equilibrium_mcore.training.single_answers import Kto

OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    NextTokenConfig: lambda settings: WeightedTokens(),
    SftConfig: lambda settings: WeightedTokens(settings.reduction, settings.constant_length),
    DistillationConfig: Distillation,
    **PAIR_OBJECTIVES,
    KtoConfig: Kto,
    RewardModelConfig: Scores,
    PolicyConfig: Policy,
}


def build_objective(settings: Any) -> Objective:
    """The objective that the settings name."""
    return OBJECTIVES[type(settings)](settings)

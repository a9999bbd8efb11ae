"""How every optimizer is built, and the state that it keeps: a row for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from equilibrium_mcore.config.optimizers import ByOptimizer, OptimizerConfig
from equilibrium_mcore.optim import adamw, cosmos, muon
from equilibrium_mcore.optim.adamw import AdamW
from equilibrium_mcore.optim.cosmos import Cosmos
from equilibrium_mcore.optim.muon import Muon
from equilibrium_mcore.optim.parameters import Parameter
from equilibrium_mcore.optim.schedule_free import AdamWithoutMomentum
from equilibrium_mcore.optim.soap import Soap


class BuildRow(NamedTuple):
    """An optimizer.

    Attributes:
        build: of parameters with their `main` weights, and all settings. The optimizer has
            `init_state()`, `set_steps(number)` and groups as `rate_groups` makes them.
        state: names of the tensors of a parameter's shape that it keeps: what is saved and loaded.
            Some settings, and schedule-free training, leave one out.
        whole_state: names of the tensors of a whole map that it keeps.
        largest: the most that step number n (from 1) can change an element of a parameter, at a
            learning rate of 1 and without weight decay, whatever the gradients were. Infinite where
            nothing bounds it.
    """

    build: Callable[[list[Parameter], OptimizerConfig], torch.optim.Optimizer]
    state: tuple[str, ...]
    largest: Callable[[Parameter, OptimizerConfig, int], float]
    whole_state: tuple[str, ...] = ()


def _inner_momentum(settings: OptimizerConfig) -> float | None:
    """Momentum instead of a matrix optimizer's own, where averaging takes its place."""
    average = settings.schedule_free
    return average.matrix_momentum if average is not None else None


def _muon(parameters: list[Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    return Muon(parameters, settings.muon, momentum=_inner_momentum(settings))


def _soap(parameters: list[Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    return Soap(parameters, settings.soap, beta1=_inner_momentum(settings))


def _cosmos(parameters: list[Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    return Cosmos(parameters, settings.cosmos, beta1=_inner_momentum(settings))


def _adamw(parameters: list[Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    if settings.schedule_free is not None:
        return AdamWithoutMomentum(parameters, settings.adamw)
    return AdamW(parameters, settings.adamw)


_SIDES = ("left_preconditioner", "left_basis", "right_preconditioner", "right_basis")
BUILDS: ByOptimizer[BuildRow] = {
    "muon": BuildRow(_muon, state=("momentum",), largest=lambda p, s, _: muon.largest(p, s.muon)),
    "soap": BuildRow(
        _soap,
        state=("momentum",),
        whole_state=("second_moment", *_SIDES),
        # A basis that turns meets second moments of another direction: only epsilon bounds it.
        largest=lambda parameter, settings, step: math.inf,
    ),
    "cosmos": BuildRow(
        _cosmos,
        state=("momentum",),
        whole_state=("subspace", "subspace_moment", "second_moment"),
        largest=lambda p, s, _: cosmos.largest(p, s.cosmos),
    ),
    "adamw": BuildRow(
        _adamw,
        state=("exp_avg", "exp_avg_sq"),
        largest=lambda _, s, step: adamw.largest(s.adamw, step),
    ),
}
"""In the order of their steps: all ranks gather in it."""


def build_optimizers(
    parameters: list[Parameter], settings: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """One optimizer for those parameters that each is to update, where there are any."""
    built = []
    for name, row in BUILDS.items():
        chosen = [p for p in parameters if p.treatment.optimizer == name]
        if chosen:
            built.append(row.build(chosen, settings))
    return built

"""Every optimizer is built by its row and keeps the state that its row names."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.config.optimizers import OPTIMIZERS, OptimizerConfig, ScheduleFreeConfig
from equilibrium_mcore.optim.build import BUILDS
from equilibrium_mcore.optim.matrix import MatrixOptimizer
from tests.optim.support import matrix

COUNTER = "step"  # torch's AdamW: a number, which a checkpoint keeps for the whole optimizer


def _built(name: str, settings: OptimizerConfig) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    weight = torch.nn.Parameter(torch.eye(6, 4))
    optimizer = BUILDS[name].build([matrix(weight, getattr(settings, name))], settings)
    weight.grad = torch.ones_like(weight)
    return optimizer, weight


def _state(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> tuple[set, set]:
    """Names of the parameter's state, and of that of its whole maps."""
    wholes = getattr(optimizer, "whole_state", {}).get(weight, [])
    return set(optimizer.state[weight]) - {COUNTER}, {key for whole in wholes for key in whole}


@pytest.mark.parametrize("name", BUILDS)
def test_state_is_what_the_row_names(name):
    """What a row does not name would not be saved."""
    optimizer, weight = _built(name, OptimizerConfig())
    optimizer.init_state()
    made = _state(optimizer, weight)
    assert made == (set(BUILDS[name].state), set(BUILDS[name].whole_state))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    for _ in range(2):  # SOAP's first step moves nothing
        optimizer.step()
    assert _state(optimizer, weight) == made
    assert not torch.equal(weight, torch.eye(6, 4))


@pytest.mark.parametrize("name", BUILDS)
def test_averaging_leaves_state_out_and_adds_none(name):
    optimizer, weight = _built(name, OptimizerConfig(schedule_free=ScheduleFreeConfig()))
    optimizer.step()
    state, whole = _state(optimizer, weight)
    assert state < set(BUILDS[name].state)
    assert whole == set(BUILDS[name].whole_state)


@pytest.mark.parametrize("name", BUILDS)
def test_what_takes_matrices_gathers_them(name):
    optimizer, _ = _built(name, OptimizerConfig())
    assert isinstance(optimizer, MatrixOptimizer) == OPTIMIZERS[name].takes_matrices


@pytest.mark.parametrize("name", BUILDS)
def test_steps_are_counted_on(name):
    """A resumed optimizer corrects its averages as if it had taken the steps itself."""
    optimizer, _ = _built(name, OptimizerConfig())
    optimizer.init_state()
    optimizer.set_steps(7)
    optimizer.step()
    counters = [state[COUNTER].item() for state in optimizer.state.values() if COUNTER in state]
    assert counters == [8.0] if counters else optimizer.steps == 8

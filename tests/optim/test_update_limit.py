"""No optimizer makes a larger update than its row says, and the worst gradients come near it."""

from __future__ import annotations

import math

import pytest
import torch

from equilibrium_mcore.config.optimizers import (
    OPTIMIZERS,
    AdamWConfig,
    CosmosConfig,
    MuonConfig,
    OptimizerConfig,
)
from equilibrium_mcore.optim.build import BUILDS
from tests.optim.support import matrix

ROWS, COLUMNS = 6, 16


def largest_change(settings: OptimizerConfig, name: str, gradients: list[torch.Tensor]) -> float:
    """The largest change of an element in the last of these steps, at a learning rate of 1."""
    weight = torch.zeros_like(gradients[0]).requires_grad_(True)
    section = getattr(settings, name)
    optimizer = BUILDS[name].build([matrix(weight, section)], settings)
    for gradient in gradients:
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    return (weight.detach() - before).abs().max().item()


def limit(settings: OptimizerConfig, name: str, step: int) -> float:
    parameter = matrix(torch.zeros(ROWS, COLUMNS), getattr(settings, name))
    return BUILDS[name].largest(parameter, settings, step)


@pytest.mark.parametrize("step", [1, 2, 7, 40])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.9), (0.0, 0.99)])
def test_adamw_is_as_large_as_its_worst_gradients_make_it(betas, step):
    beta1, beta2 = betas
    section = AdamWConfig(beta1=beta1, beta2=beta2, weight_decay=0.0, epsilon=1e-12)
    settings = OptimizerConfig(adamw=section)
    # Where Cauchy and Schwarz are equal: each older gradient is beta1 / beta2 times the newer.
    ratios = [(beta1 / beta2) ** (step - 1 - n) for n in range(step)]
    worst = [torch.full((ROWS, COLUMNS), ratio, dtype=torch.float64) for ratio in ratios]
    changed = largest_change(settings, "adamw", worst)
    assert changed == pytest.approx(limit(settings, "adamw", step), rel=1e-6)
    draw = torch.Generator().manual_seed(step)
    drawn = [torch.randn(ROWS, COLUMNS, generator=draw).double() ** 5 for _ in range(step)]
    assert largest_change(settings, "adamw", drawn) <= changed * (1 + 1e-9)


def spike() -> torch.Tensor:
    """A gradient of one element: its direction has all of itself there."""
    gradient = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    gradient[2, 3] = 7.0
    return gradient


@pytest.mark.parametrize("coefficients", ["simple", "quintic", "polar_express", "cans", "aol"])
@pytest.mark.parametrize("scale", ["spectral", "shape_scaling"])
def test_muon(coefficients, scale):
    section = MuonConfig(coefficients=coefficients, scale=scale, weight_decay=0.0)
    settings = OptimizerConfig(muon=section)
    most = limit(settings, "muon", 1)
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(ROWS, COLUMNS, generator=draw).double() ** 3 for _ in range(20)]
    changes = [largest_change(settings, "muon", [gradient]) for gradient in [*drawn, spike()]]
    assert max(changes) <= most * (1 + 1e-9)
    assert max(changes) > most / 2


def test_cosmos():
    settings = OptimizerConfig(matrices="cosmos", cosmos=CosmosConfig(weight_decay=0.0))
    most = limit(settings, "cosmos", 1)
    assert most == pytest.approx(settings.cosmos.update_rms * math.sqrt(ROWS * COLUMNS))
    changed = largest_change(settings, "cosmos", [spike()])
    assert most / 2 < changed <= most * (1 + 1e-9)


def test_soap_is_bounded_by_nothing():
    assert limit(OptimizerConfig(matrices="soap"), "soap", 5) == math.inf


def test_every_optimizer_has_a_case_here():
    assert set(OPTIMIZERS) == {"adamw", "muon", "cosmos", "soap"}

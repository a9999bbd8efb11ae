"""Muon, SOAP, COSMOS and schedule-free training against references written from their papers."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.config.optimizers import (
    AdamWConfig,
    CosmosConfig,
    MuonConfig,
    ScheduleFreeConfig,
    SoapConfig,
)
from equilibrium_mcore.optim.cosmos import Cosmos
from equilibrium_mcore.optim.muon import Muon
from equilibrium_mcore.optim.newton_schulz import orthogonalise
from equilibrium_mcore.optim.parts import Parts
from equilibrium_mcore.optim.schedule_free import AdamWithoutMomentum, ScheduleFree
from equilibrium_mcore.optim.soap import Soap
from tests.optim import references
from tests.optim.support import matrix

SHAPES = [(24, 40), (40, 24), (16, 16)]
KINDS = {
    "muon": (Muon, references.Muon, MuonConfig(learning_rate=0.02, extra_scale=0.2)),
    "muon_plain": (Muon, references.Muon, MuonConfig(nesterov=False, weight_decay=0.0)),
    "soap": (Soap, references.Soap, SoapConfig(learning_rate=0.02, basis_interval_steps=2)),
    "cosmos": (Cosmos, references.Cosmos, CosmosConfig(learning_rate=0.05, rank=6)),
    "cosmos_rank_is_bounded": (Cosmos, references.Cosmos, CosmosConfig(learning_rate=0.05)),
}


def gradients(shape: tuple[int, int], steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Gradients with a spread spectrum that turns slowly, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rows, columns = shape
    scales = torch.logspace(0, -2, columns, dtype=torch.float64)
    base = draw(rows, columns)
    return [(base + 0.5 * draw(rows, columns)) * scales for _ in range(steps)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_follows_its_paper(kind, shape):
    build, reference, config = KINDS[kind]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = start.clone()
    optimizer, expected = build([matrix(weight, config)], config), reference(start, config)
    for gradient in gradients(shape, 7):
        weight.grad = gradient.clone()
        optimizer.step()
        expected.step(gradient)
    moved = (expected.w - start).norm()
    assert moved > 0.01
    assert (weight - expected.w).norm() / moved < 1e-9


@pytest.mark.parametrize("kind", ["muon", "soap", "cosmos"])
def test_float32_follows_float64(kind):
    """The float32 path is another code for Newton-Schulz: emerging-optimizers' own."""
    build, reference, config = KINDS[kind]
    weight = torch.zeros(24, 40)
    optimizer, expected = build([matrix(weight, config)], config), reference(weight, config)
    for gradient in gradients((24, 40), 3):
        weight.grad = gradient.float()
        optimizer.step()
        expected.step(gradient)
    assert (weight.double() - expected.w).norm() / expected.w.norm() < 2e-4


@pytest.mark.parametrize("kind", ["muon", "soap", "cosmos"])
def test_each_part_is_a_matrix_by_itself(kind):
    build, _, config = KINDS[kind]
    whole, parts = torch.randn(12, 20, dtype=torch.float64), Parts(("a", "b"), (4, 8))
    apart = [part.clone() for part in whole.split([4, 8])]
    together = build([matrix(whole, config, parts)], config)
    each = [build([matrix(part, config)], config) for part in apart]
    for gradient in gradients((12, 20), 4):
        whole.grad = gradient.clone()
        together.step()
        for part, optimizer, share in zip(apart, each, gradient.split([4, 8]), strict=True):
            part.grad = share.clone()
            optimizer.step()
    torch.testing.assert_close(whole, torch.cat(apart), rtol=0, atol=1e-10)


@pytest.mark.parametrize("coefficients", ["simple", "quintic", "polar_express", "cans", "aol"])
@pytest.mark.parametrize("steps", [3, 5, 9])
def test_float64_newton_schulz_is_emerging_optimizers_iteration(coefficients, steps):
    stack = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    settings = {"steps": steps, "coefficients": coefficients, "precision": "highest"}
    narrow, wide = orthogonalise(stack, **settings), orthogonalise(stack.double(), **settings)
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-4)


def test_a_side_that_is_too_large_keeps_its_basis():
    config = SoapConfig(max_dimension=30, basis_interval_steps=2)
    weight = torch.zeros(24, 40, dtype=torch.float64)
    optimizer = Soap([matrix(weight, config)], config)
    for gradient in gradients((24, 40), 3):
        weight.grad = gradient
        optimizer.step()
    state = optimizer.whole_state[weight][0]
    assert set(state) == {"second_moment", "left_preconditioner", "left_basis"}
    assert weight.norm() > 0


def test_an_expert_without_tokens_stays():
    """A zero gradient has no direction; it must not become one, nor NaN."""
    for build, config in ((Muon, MuonConfig()), (Soap, SoapConfig()), (Cosmos, CosmosConfig())):
        config = config.model_copy(update={"weight_decay": 0.0})
        weight = torch.ones(8, 6)
        optimizer = build([matrix(weight, config)], config)
        for _ in range(3):
            weight.grad = torch.zeros(8, 6)
            optimizer.step()
        assert torch.equal(weight, torch.ones(8, 6)), build.__name__


def _run_schedule_free(build, section, start, rates, decay):
    """Averaged and fast weights after a step at each rate, by the package."""
    z = start.clone()
    parameter = matrix(z, section)
    average = ScheduleFree([parameter], ScheduleFreeConfig(beta=0.8))
    inner = build([parameter])
    points = []
    for rate, gradient in zip(rates, gradients(tuple(start.shape), len(rates)), strict=True):
        points.append(average.training_weights(parameter))
        z.grad = gradient.clone()
        for group in inner.param_groups:
            group.update(lr=section.learning_rate * rate, outer_weight_decay=decay, weight_decay=0)
        average.decay(inner.param_groups)
        inner.step()
        average.update_average(rate)
    return average.average(parameter), z, points


RATES = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_schedule_free_adamw_follows_its_paper():
    config = AdamWConfig(learning_rate=0.1, beta2=0.9)
    start = torch.randn(12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, z, points = _run_schedule_free(
        lambda chosen: AdamWithoutMomentum(chosen, config),
        config.model_copy(update={"weight_decay": 0.3}),
        start,
        RATES,
        0.3,
    )
    expected, second = references.ScheduleFree(start, 0.8), torch.zeros_like(start)
    for t, (rate, g) in enumerate(zip(RATES, gradients((12, 20), len(RATES)), strict=True), 1):
        torch.testing.assert_close(points[t - 1], expected.y, rtol=0, atol=1e-12)
        second = 0.9 * second + 0.1 * g**2
        direction = g / ((second / (1 - 0.9**t)).sqrt() + config.epsilon)
        expected.step(direction, rate * config.learning_rate, 0.3)
    torch.testing.assert_close(x, expected.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(z, expected.z, rtol=0, atol=1e-12)
    assert (x - z).norm() > 0.01


def test_schedule_free_muon_averages_orthogonal_steps():
    config = MuonConfig(learning_rate=0.05, weight_decay=0.0)
    start = torch.randn(12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, z, _ = _run_schedule_free(
        lambda chosen: Muon(chosen, config, momentum=0.0), config, start, RATES, 0.0
    )
    expected = references.ScheduleFree(start, 0.8)
    for rate, g in zip(RATES, gradients((12, 20), len(RATES)), strict=True):
        direction = references.newton_schulz(g, references.QUINTIC) * 20**0.5
        expected.step(direction, rate * config.learning_rate, 0.0)
    torch.testing.assert_close(x, expected.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(z, expected.z, rtol=0, atol=1e-10)

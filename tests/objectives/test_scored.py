"""The losses of scores and of single answers against trl's numbers, and by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from equilibrium_mcore.objectives.pairwise import bradley_terry
from equilibrium_mcore.objectives.unpaired import kto

ANSWERS, LONGEST = 6, 7


def same(value):
    return value


def draw(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("centring", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_has_trls_numbers(centring, with_margin):
    from trl import RewardTrainer

    scores, margin = draw(2 * ANSWERS, seed=1), draw(ANSWERS, seed=2).abs()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        args=SimpleNamespace(center_rewards_coefficient=centring),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * ANSWERS, 3)}
    if with_margin:
        inputs["margin"] = margin
    outputs = SimpleNamespace(logits=scores.unsqueeze(-1))
    expected = RewardTrainer.compute_loss(trainer, lambda **kwargs: outputs, inputs)
    chosen, rejected = scores.chunk(2)
    settings = {"margin": margin if with_margin else 0.0, "centring": centring or 0.0}
    found = bradley_terry(chosen, rejected, **settings).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("shift", [-5.0, 5.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
def test_trap_kto_has_trls_numbers(weights, shift):
    """With mismatched answers that the policy finds less, and more, likely than the reference."""
    from trl import KTOTrainer

    log_p, reference = draw(ANSWERS, LONGEST, seed=3), draw(ANSWERS, seed=4)
    mismatched, other = draw(ANSWERS, seed=5) + shift, draw(ANSWERS, seed=6)
    desirable = torch.tensor([True, False, True, True, False, False])
    outputs = SimpleNamespace(
        log_probs=log_p, entropy=torch.zeros_like(log_p), mean_logits=torch.zeros_like(log_p)
    )
    ids = torch.zeros(ANSWERS, LONGEST + 1, dtype=torch.long)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda model, batch: mismatched,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.ones_like(ids),
        "label": desirable,
        "ref_logps": reference,
        "ref_KL_logps": other,
    }
    expected = KTOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)
    z = (mismatched - other).mean().clamp(min=0)
    assert (z > 0) == (shift > 0)
    found = kto(
        log_p.sum(1) - reference,
        desirable,
        z,
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    ).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_by_hand():
    one = torch.tensor([1.0])
    assert bradley_terry(one, -one, margin=2.0, centring=5.0).item() == pytest.approx(math.log(2))
    assert bradley_terry(one, one, centring=0.5).item() == pytest.approx(math.log(2) + 2)
    half = kto(3 * one, torch.tensor([True]), 3 * one, beta=0.1, desirable_weight=2.0)
    assert half.item() == pytest.approx(1.0)
    yes, no = (kto(one, torch.tensor([d]), 0 * one, beta=1.0).item() for d in (True, False))
    assert yes + no == pytest.approx(1.0) and yes == pytest.approx(1 / (1 + math.e))

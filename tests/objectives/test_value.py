"""Values: verl's formula for GAE, a hand-made example, and poison at what is not produced."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.objectives.truncation import outcomes
from equilibrium_mcore.objectives.value import (
    explained_variance,
    gae,
    token_rewards,
    value_loss,
)


def verls(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
):
    """The recursion of verl's core_algos, over padded rows [R, S]."""
    following, last = torch.zeros(len(rewards)), torch.zeros(len(rewards))
    found = []
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        last = (delta + gamma * lam * last) * here + (1 - here) * last
        following = values[:, t] * here + (1 - here) * following
        found.append(last)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages * mask, (advantages + values) * mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
def test_it_is_verls_recursion(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    rows, width = 4, 9
    rewards, values = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    mask = (torch.rand(rows, width, generator=generator) < 0.6).double()
    mask[:, 4] = 1
    rewards = rewards * mask
    found = gae(
        rewards.flatten(),
        values.flatten(),
        mask.flatten(),
        torch.arange(rows).repeat_interleave(width),
        bootstraps=torch.zeros(rows),
        gamma=gamma,
        trace_decay=lam,
    )
    advantages, returns = verls(rewards, values, mask, gamma, lam)
    assert torch.allclose(found.advantages, advantages.flatten(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.returns, returns.flatten(), rtol=1e-12, atol=1e-12)


def test_trap_both_finishes_by_hand():
    """Two answers of two tokens to a prompt of one: one ended, one was cut off at its length."""
    mask = torch.tensor([0, 1, 1, 0, 1, 1])
    answers = torch.tensor([0, 0, 0, 1, 1, 1])
    values = torch.tensor([5.0, 0.5, 0.25, 5.0, 0.5, 0.25])
    cut, after = torch.tensor([False, True]), torch.tensor([7.0, 0.75])
    earned = outcomes(torch.tensor([1.0, 1.0]), cut, way="bootstrap", after=after)
    rewards = token_rewards(earned.scores, mask, answers)
    assert rewards.tolist() == [0, 0, 1, 0, 0, 0]
    found = gae(
        rewards, values, mask, answers, bootstraps=earned.bootstraps, gamma=0.5, trace_decay=0.5
    )
    # ended:  d2 = 1 - 0.25 = 0.75;             d1 = 0.5 * 0.25 - 0.5 = -0.375; A1 = d1 + 0.25 d2
    # cut:    d2 = 0.5 * 0.75 - 0.25 = 0.125;   d1 = -0.375;                    A1 = d1 + 0.25 d2
    assert found.advantages.tolist() == [0, -0.1875, 0.75, 0, -0.34375, 0.125]
    assert found.returns.tolist() == [0, 0.3125, 1.0, 0, 0.15625, 0.375]


def test_trap_gae_passes_over_what_is_not_produced():
    """Against a loop over the produced tokens alone, with poison everywhere else."""
    generator = torch.Generator().manual_seed(5)
    count, answers = 40, torch.arange(40) // 10
    mask = (torch.rand(count, generator=generator) < 0.5).long()
    mask[::10], mask[5::10] = 0, 1
    rewards, values = torch.randn(2, count, generator=generator, dtype=torch.float64)
    bootstraps = torch.tensor([0.0, 0.5, 0.0, -1.0])
    expected = [0.0] * count
    for answer in range(4):
        places = [i for i in range(count) if answers[i] == answer and mask[i]]
        following, advantage = float(bootstraps[answer]), 0.0
        for i in reversed(places):
            delta = float(rewards[i]) + 0.9 * following - float(values[i])
            advantage = delta + 0.9 * 0.8 * advantage
            expected[i], following = advantage, float(values[i])
    for poison in (0.0, 1e30, float("nan")):
        poisoned = [torch.where(mask > 0, given, poison) for given in (rewards, values)]
        found = gae(*poisoned, mask, answers, bootstraps=bootstraps, gamma=0.9, trace_decay=0.8)
        assert found.advantages.tolist() == pytest.approx(expected, rel=1e-12)
        assert not found.returns.isnan().any()


def test_rewards_of_tokens_are_a_score_at_the_last_and_a_cost_at_each():
    mask = torch.tensor([0, 1, 1, 0, 1, 0])
    answers = torch.tensor([0, 0, 0, 1, 1, 1])
    costs = torch.tensor([9.0, 0.1, 0.2, 9.0, 0.3, 9.0], dtype=torch.float64)
    found = token_rewards(torch.tensor([1.0, 2.0]), mask, answers, penalties=costs)
    assert found.tolist() == pytest.approx([0, -0.1, 0.8, 0, 1.7, 0])
    with pytest.raises(ValueError, match="answer 1 has no produced token"):
        token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([1, 0]), torch.tensor([0, 1]))


def test_a_values_loss_is_the_larger_of_two():
    """Moved from 0 to 0.5 with a clip of 0.2, as verl and trl have it."""
    values = torch.tensor([0.5, 0.5, 0.1], dtype=torch.float64)
    returns = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    old = torch.zeros(3, dtype=torch.float64)
    clipped = value_loss(values, old, returns, clip=0.2)
    assert clipped.tolist() == pytest.approx([0.8**2 / 2, 0.5**2 / 2, 0.9**2 / 2])
    free = value_loss(values, old, returns, clip=None)
    assert free.tolist() == pytest.approx([0.125, 0.125, 0.405])


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((4,), 1.5), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) < 0
    assert explained_variance(returns, torch.ones(4)) == 0.0

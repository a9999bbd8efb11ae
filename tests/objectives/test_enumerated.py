"""Exact expectations: every answer of three tokens over a vocabulary of five is summed over."""

from __future__ import annotations

import itertools

import pytest
import torch

from equilibrium_mcore.config.policy import PRESETS, PolicyConfig
from equilibrium_mcore.objectives.kl import ESTIMATORS, PLACES, penalised
from equilibrium_mcore.objectives.policy import RATIOS, SURROGATES, Answers

VOCABULARY, LENGTH = 5, 3
OUTCOMES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


def logits(seed: int, *, depends: bool = True) -> torch.Tensor:
    """Of each position and previous token (the last is none), [LENGTH, VOCABULARY + 1, V].

    Or of each position alone, [LENGTH, 1, V].
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (LENGTH, VOCABULARY + 1 if depends else 1, VOCABULARY)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def before(table: torch.Tensor) -> torch.Tensor:
    """The row of the table that each token of each outcome is drawn from, [outcomes, LENGTH]."""
    if table.shape[1] == 1:
        return torch.zeros_like(OUTCOMES)
    return torch.cat([torch.full((len(OUTCOMES), 1), VOCABULARY), OUTCOMES[:, :-1]], dim=1)


def log_p(table: torch.Tensor) -> torch.Tensor:
    """log p of each token of each outcome, given the one before, [outcomes, LENGTH]."""
    return table.log_softmax(-1)[torch.arange(LENGTH), before(table), OUTCOMES]


def gradient(value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, table)[0]


def divergence(table: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) over whole answers, by definition."""
    mine = log_p(table).sum(1)
    return (mine.exp() * (mine - log_p(reference).sum(1))).sum()


def in_the_loss(estimator: str, table: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """E[gradient of the sum over tokens], on policy."""
    table = table.clone().requires_grad_()
    mine = log_p(table)
    chances = mine.sum(1).exp().detach()
    terms = ESTIMATORS[estimator](mine, log_p(reference), mine.detach()).sum(1)
    return gradient((chances * terms).sum(), table)


def in_the_reward(estimator: str, table: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """E[(sum over tokens, as a cost) gradient of log p]."""
    table = table.clone().requires_grad_()
    mine = log_p(table)
    chances = mine.sum(1).exp().detach()
    with torch.no_grad():
        sums = ESTIMATORS[estimator](mine, log_p(reference), mine).sum(1)
        rewards = penalised(torch.zeros(len(sums)), sums, coefficient=1.0)
    return gradient((-chances * rewards * mine.sum(1)).sum(), table)


def exactly(table: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    table = table.clone().requires_grad_()
    return gradient(divergence(table, reference), table)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error."""
    return float((found - expected).norm() / expected.norm())


def test_kl_estimators_as_the_table_of_their_module_has_them():
    """Tokens that do not depend on each other: an answer's divergence is that of its tokens."""
    table, reference = logits(1, depends=False), logits(2, depends=False)
    expected = exactly(table, reference)
    for estimator in ("k2", "ratio_k3"):
        assert off(in_the_loss(estimator, table, reference), expected) < 1e-12
    assert off(in_the_reward("k1", table, reference), expected) < 1e-12
    assert in_the_loss("k1", table, reference).abs().max() < 1e-12
    other = table.clone().requires_grad_()
    mine, theirs = log_p(other).sum(1), log_p(reference).sum(1)
    forward_kl = gradient((theirs.exp() * (theirs - mine)).sum(), other)
    assert off(in_the_loss("k3", table, reference), forward_kl) < 1e-12
    assert off(in_the_loss("k3", table, reference), expected) > 0.1
    for estimator in ("k2", "k3"):
        assert off(in_the_reward(estimator, table, reference), expected) > 0.1


def test_what_a_token_owes_for_those_behind_it_is_in_the_reward_alone():
    """Tokens that depend on each other: the loss has each token's divergence given its past."""
    table, reference = logits(3), logits(4)
    assert off(in_the_reward("k1", table, reference), exactly(table, reference)) < 1e-12
    other = table.clone().requires_grad_()
    chances = log_p(other).cumsum(1).exp().detach()
    rows = other.log_softmax(-1)
    mine = rows[torch.arange(LENGTH), before(other)]
    theirs = reference.log_softmax(-1)[torch.arange(LENGTH), before(other)]
    of_tokens = (mine.exp() * (mine - theirs)).sum(-1)
    given_past = gradient((chances[:, -1:] * of_tokens).sum(), other)
    for estimator in ("k2", "ratio_k3"):
        assert off(in_the_loss(estimator, table, reference), given_past) < 1e-12
    assert off(given_past, exactly(table, reference)) > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_values_of_estimators_are_the_divergence(estimator):
    table, reference = logits(5), logits(6)
    mine, theirs = log_p(table), log_p(reference)
    found = (mine.sum(1).exp() * ESTIMATORS[estimator](mine, theirs, mine).sum(1)).sum()
    assert found.item() == pytest.approx(divergence(table, reference).item(), rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"opd"}))
def test_the_policy_gradient_on_policy_is_exact(name):
    """Whatever ratio and surrogate: E[reward gradient of log p], where sums over tokens are."""
    config = PolicyConfig.model_validate({"preset": name})
    table = logits(7).requires_grad_()
    rewards = torch.randn(
        len(OUTCOMES), generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    mine = log_p(table)
    expected = gradient(-(mine.sum(1).exp() * rewards).sum(), table)
    mine = log_p(table)
    numbers = torch.arange(len(OUTCOMES)).repeat_interleave(LENGTH)
    flat = mine.flatten()
    answers = Answers(torch.ones(len(flat), dtype=torch.float64), numbers, len(OUTCOMES))
    log_ratio = RATIOS[config.ratio](flat, flat.detach(), answers)
    bounds = {"low": config.clip_low, "high": config.clip_high}
    losses = SURROGATES[config.surrogate](log_ratio, flat, rewards[numbers], **bounds).losses
    found = (mine.sum(1).exp().detach() * losses.view(-1, LENGTH).sum(1)).sum()
    assert off(gradient(found, table), expected) < 1e-12


def test_a_teachers_advantages_are_the_gradient_of_the_reverse_kl():
    """Of each token given its past: -log ratio as an advantage of the token alone."""
    table, teacher = logits(9, depends=False), logits(10, depends=False)
    other = table.clone().requires_grad_()
    mine = log_p(other)
    advantages = log_p(teacher) - mine.detach()
    chances = mine.sum(1).exp().detach()
    found = gradient(-(chances[:, None] * advantages * mine).sum(), other)
    assert off(found, exactly(table, teacher)) < 1e-12


def test_trap_kl_is_taken_once():
    """In the reward or in the loss; an estimator that is of no use in a place is refused."""
    for place, allowed in PLACES.items():
        for estimator in ESTIMATORS:
            values = {"kl": {"coefficient": 0.1, "estimator": estimator, "place": place}}
            if estimator in allowed:
                config = PolicyConfig.model_validate(values)
                assert (config.kl.place, config.kl.estimator) == (place, estimator)
            else:
                with pytest.raises(ValueError, match=f"estimator='{estimator}' with place"):
                    PolicyConfig.model_validate(values)
    with pytest.raises(ValueError, match="place"):
        PolicyConfig.model_validate({"kl": {"place": "both"}})

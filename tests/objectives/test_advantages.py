"""Advantages by loops over lists, and traps of their statistics."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from equilibrium_mcore.objectives.advantages import (
    BASELINES,
    SCALES,
    Scores,
    advantages,
    dead_prompts,
    teachers,
    whitened,
)
from equilibrium_mcore.objectives.truncation import outcomes


def drawn(seed: int = 1) -> tuple[list[float], list[int]]:
    draw = random.Random(seed)
    prompts = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3]
    draw.shuffle(prompts)
    return [draw.uniform(-1, 2) for _ in prompts], prompts


def scores(rewards: list[float], prompts: list[int], **more: torch.Tensor) -> Scores:
    return Scores(torch.tensor(rewards, dtype=torch.float64), torch.tensor(prompts), **more)


def by_hand(baseline: str, scale: str, rewards: list[float], prompts: list[int]) -> list[float]:
    found = []
    for reward, prompt in zip(rewards, prompts, strict=True):
        group = [r for r, p in zip(rewards, prompts, strict=True) if p == prompt]
        value = {
            "group": reward - statistics.fmean(group),
            "leave_one_out": (
                reward - (sum(group) - reward) / (len(group) - 1) if len(group) > 1 else 0.0
            ),
            "batch": reward - statistics.fmean(rewards),
            "tracker": reward - 0.25,
        }[baseline]
        if scale == "std":
            value = value / (statistics.stdev(group) + 1e-4) if len(group) > 1 else 0.0
        found.append(value)
    if scale == "batch":
        mean, deviation = statistics.fmean(found), statistics.stdev(found)
        found = [(value - mean) / (deviation + 1e-8) for value in found]
    return found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_each_is_what_a_loop_finds(baseline, scale):
    rewards, prompts = drawn()
    given = scores(rewards, prompts, baselines=torch.full((len(rewards),), 0.25))
    found = advantages(given, baseline=baseline, scale=scale)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(by_hand(baseline, scale, rewards, prompts), rel=1e-9)
    cut = advantages(given, baseline=baseline, scale=scale, bound=0.3)
    assert cut.tolist() == pytest.approx(found.clamp(-0.3, 0.3).tolist())


@pytest.mark.parametrize("reward", [0.35, 1 / 3, 0.1, 1e-3, 7.7])
@pytest.mark.parametrize("count", [3, 6, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trap_equal_rewards_give_exactly_zero(reward, count, dtype):
    """Their mean is not always they; divided by a deviation of rounding it would be huge."""
    rewards = torch.full((count,), reward, dtype=dtype)
    given = Scores(rewards, torch.zeros(count, dtype=torch.int64))
    for baseline in ("group", "leave_one_out", "batch"):
        for scale in SCALES:
            assert (advantages(given, baseline=baseline, scale=scale) == 0).all()
    assert dead_prompts(given) == 1.0


def test_trap_nearly_equal_rewards_stay_small():
    rewards = torch.full((8,), 0.35)
    rewards[3] += 1e-7
    given = Scores(rewards, torch.zeros(8, dtype=torch.int64))
    assert advantages(given, baseline="group", scale="std").abs().max() < 2e-3


def test_trap_whitening_is_of_the_whole_batch():
    """In whatever order and cut it is later used; of each half it would be another."""
    rewards, prompts = drawn(2)
    given = scores(rewards, prompts, baselines=torch.zeros(len(rewards)))
    whole = advantages(given, baseline="tracker", scale="batch")
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    turned = Scores(given.rewards[order], given.prompts[order], given.baselines[order])
    assert torch.allclose(
        advantages(turned, baseline="tracker", scale="batch"), whole[order], rtol=1e-12
    )
    halves = torch.cat([whitened(half) for half in given.rewards.chunk(2)])
    assert not torch.allclose(halves, whole, atol=1e-2)


def test_trap_difficulty_bias_of_the_deviation():
    """Solved 7 times of 8, a prompt pulls less than one solved 4 times; by the deviation, alike."""
    solved = (4, 7)
    rewards = [float(n < count) for count in solved for n in range(8)]
    given = scores(rewards, [0] * 8 + [1] * 8)

    def pull(scale: str) -> list[float]:
        found = advantages(given, baseline="group", scale=scale)
        return [part.square().mean().sqrt().item() for part in found.chunk(2)]

    assert pull("none") == pytest.approx([math.sqrt(n / 8 * (1 - n / 8)) for n in solved])
    assert pull("std") == pytest.approx([math.sqrt(7 / 8)] * 2, rel=1e-3)


def test_dead_prompts_are_those_with_one_reward():
    assert dead_prompts(scores([1, 1, 0, 1, 0], [0, 0, 1, 1, 2])) == 0.5
    assert dead_prompts(scores([1, 0], [0, 1])) == 0.0


def test_a_teachers_advantage_is_its_log_ratio():
    found = teachers(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5]))
    assert found.tolist() == [0.5, -1.5]


def test_trap_truncated_answers_earn_what_is_said():
    given, cut = torch.tensor([1.0, 0.5]), torch.tensor([False, True])
    after = torch.tensor([9.0, 0.25])
    for way, expected in {
        "score": ([1.0, 0.5], [0.0, 0.0], [True, True]),
        "zero": ([1.0, 0.0], [0.0, 0.0], [True, True]),
        "mask": ([1.0, 0.0], [0.0, 0.0], [True, False]),
        "bootstrap": ([1.0, 0.0], [0.0, 0.25], [True, True]),
    }.items():
        found = outcomes(given, cut, way=way, after=after)
        assert tuple(part.tolist() for part in found) == expected
    with pytest.raises(ValueError, match="critic"):
        outcomes(given, cut, way="bootstrap")
    with pytest.raises(ValueError, match="must be"):
        outcomes(given, cut, way="other")

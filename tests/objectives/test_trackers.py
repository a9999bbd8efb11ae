"""What prompts are expected to earn: by hand, and after a resume."""

from __future__ import annotations

import json

import pytest
import torch

from equilibrium_mcore.objectives.kl import Adaptive, Fixed
from equilibrium_mcore.objectives.mismatch import CORRECTIONS, mismatch
from equilibrium_mcore.objectives.trackers import TRACKERS, PromptTracker, SingleTracker


def test_minimind_by_hand():
    """a = b = 1 at start; q = 0.9 at first, then 2^(-change / 0.06) within 0.5 and 0.96."""
    tracker = SingleTracker()
    assert tracker.baselines([7, 8]).tolist() == [0.0, 0.0]
    tracker.update([7, 8], torch.tensor([3.0, 0.0]), log_p=-1.0, drift=0.0)
    a, b = 0.9 + 0.75, 0.9 + 0.25
    assert tracker.baselines([1]).item() == pytest.approx(6 * a / (a + b) - 3)
    for log_p, keep in ((-1.03, 2**-0.5), (-1.04, 2 ** (-0.01 / 0.06)), (-1.041, 0.96), (-3, 0.5)):
        tracker.update([7], torch.tensor([-3.0]), log_p=log_p, drift=0.0)
        a, b = keep * a, keep * b + 1
        assert tracker.baselines([1]).item() == pytest.approx(6 * a / (a + b) - 3)


def test_the_papers_by_hand():
    """8 pseudo-visits at the prior; a prompt forgets what the policy moved since its last visit."""
    tracker = PromptTracker(prior=0.25)
    assert tracker.baselines([1]).item() == pytest.approx(0.25)
    tracker.update([1], torch.tensor([1.0]), log_p=0.0, drift=5.0)  # moved before: not its past
    a, b = 0.96 * 2 + 1, 0.96 * 6
    assert tracker.baselines([1]).item() == pytest.approx(a / (a + b))
    tracker.update([2], torch.tensor([0.0]), log_p=0.0, drift=0.004)
    assert tracker.baselines([1]).item() == pytest.approx(a / (a + b))
    tracker.update([1, 1], torch.tensor([0.0, 1.0]), log_p=0.0, drift=0.003)
    keep = 2 ** (-0.007 / 0.06)
    a, b = keep * a + 0.5, keep * b + 0.5
    assert tracker.baselines([1]).item() == pytest.approx(a / (a + b))
    tracker.update([1], torch.tensor([1.0]), log_p=0.0, drift=1.0)
    a, b = 0.875 * a + 1, 0.875 * b
    v = a / (a + b)
    assert tracker.baselines([1]).item() == pytest.approx(v)
    assert tracker.priorities([1]).item() == pytest.approx((v * (1 - v)) ** 0.5 + 0.05)


def test_a_reward_outside_of_the_trackers_range_is_told():
    with pytest.raises(ValueError, match=r"tracker\.high"):
        PromptTracker().update([1], torch.tensor([1.5]), log_p=0.0, drift=0.0)


@pytest.mark.parametrize("form", TRACKERS)
def test_a_tracker_goes_on_to_the_bit_after_a_checkpoint(form):
    draw = torch.Generator().manual_seed(1)
    straight, resumed = TRACKERS[form](), TRACKERS[form]()
    for step in range(6):
        keys = torch.randint(2**63 - 1, (3,), generator=draw).tolist() if step % 2 else [5, 6, 7]
        rewards = torch.rand(3, generator=draw)
        moved = {"log_p": -1 - 0.01 * step, "drift": 0.003 * step}
        straight.update(keys, rewards, **moved)
        resumed.update(keys, rewards, **moved)
        saved = json.loads(json.dumps(resumed.state()))
        resumed = TRACKERS[form]()
        resumed.load(saved)
        assert torch.equal(straight.baselines([5, *keys]), resumed.baselines([5, *keys]))


def test_the_coefficient_of_the_divergence():
    fixed, adaptive = Fixed(0.1), Adaptive(0.1, target=0.05, horizon=100)
    for coefficient in (fixed, adaptive):
        coefficient.update(0.055, answers=10)
    assert fixed.value == 0.1 and adaptive.value == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    adaptive.update(99.0, answers=10)
    assert adaptive.value == pytest.approx(0.1 * 1.01 * 1.02)
    other = Adaptive(0.5, target=0.05, horizon=100)
    other.load(adaptive.state())
    assert other.value == adaptive.value


def test_trap_generation_and_training_differ():
    """Their ratio is bounded above, or left out; what differs is measured in float64."""
    sampled = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    old = sampled + torch.tensor([0.0, 0.5, 3.0, -3.0])
    assert CORRECTIONS["none"](old, sampled, 0.5, 2.0).tolist() == [1, 1, 1, 1]
    found = CORRECTIONS["truncate"](old, sampled, 0.5, 2.0)
    assert found.tolist() == pytest.approx([1, 1.6487212, 2, 0.0497871])
    found = CORRECTIONS["mask"](old, sampled, 0.5, 2.0)
    assert found.tolist() == pytest.approx([1, 1.6487212, 0, 0])
    measured = mismatch(old, sampled)
    assert measured.mean == pytest.approx(6.5 / 4) and measured.largest == 3.0
    assert measured.k3 > 0 and mismatch(old, old).k3 == 0
    assert mismatch(old[:0], old[:0]).largest == 0

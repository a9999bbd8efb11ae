"""Losses of the policy gradient against trl's numbers, and traps of ratios and lengths."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from equilibrium_mcore.config.policy import PRESETS, PolicyConfig
from equilibrium_mcore.objectives.kl import ESTIMATORS
from equilibrium_mcore.objectives.policy import RATIOS, SURROGATES, Answers
from equilibrium_mcore.objectives.reduction import REDUCTIONS

ANSWERS, LONGEST, CONSTANT = 6, 9, 16


def draw(seed: int) -> dict[str, torch.Tensor]:
    """Log-probabilities of three policies, [ANSWERS, LONGEST], advantages and a mask; float64."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, LONGEST + 1, (ANSWERS,), generator=generator)
    old = -rand(ANSWERS, LONGEST) * 3
    return {
        "log_p": old + (rand(ANSWERS, LONGEST) - 0.5),
        "old": old,
        "reference": old + (rand(ANSWERS, LONGEST) - 0.5),
        "advantages": rand(ANSWERS) - 0.5,
        "mask": (torch.arange(LONGEST) < lengths[:, None]).double(),
    }


def mine(config: PolicyConfig, drawn: dict[str, torch.Tensor], log_p: torch.Tensor) -> torch.Tensor:
    """The loss as the training objective puts it together."""
    flat = {name: drawn[name].flatten() for name in ("old", "reference", "mask")}
    numbers = torch.arange(ANSWERS).repeat_interleave(LONGEST)
    answers = Answers(flat["mask"], numbers, ANSWERS)
    log_ratio = RATIOS[config.ratio](log_p.flatten(), flat["old"], answers)
    advantages = drawn["advantages"][numbers]
    bounds = {"low": config.clip_low, "high": config.clip_high}
    losses = SURROGATES[config.surrogate](log_ratio, log_p.flatten(), advantages, **bounds).losses
    if config.kl.coefficient and config.kl.place == "loss":
        term = ESTIMATORS[config.kl.estimator](log_p.flatten(), flat["reference"], flat["old"])
        losses = losses + config.kl.coefficient * term
    positions = torch.arange(LONGEST).expand(ANSWERS, LONGEST)
    length = config.constant_length
    weights, divisor = REDUCTIONS[config.reduction](drawn["mask"], positions, length)
    return (losses * weights.flatten()).sum() / divisor


def trls(loss_type: str, drawn: dict[str, torch.Tensor], log_p: torch.Tensor, **settings):
    """trl's GRPOTrainer on given log-probabilities: its loss alone, with stubs around it."""
    from trl import GRPOTrainer

    def same(value, *args, **kwargs):
        return value

    known = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "level": "token", **settings}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_p, torch.zeros_like(log_p), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=known["level"],
        beta=known["beta"],
        loss_type=loss_type,
        epsilon_low=known["epsilon_low"],
        epsilon_high=known["epsilon_high"],
        args=SimpleNamespace(
            use_bias_correction_kl=known.get("unbiased", False),
            delta=None,
            steps_per_generation=1,
        ),
        use_vllm=False,
        max_completion_length=CONSTANT,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same, device="cpu"),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    empty = torch.zeros(ANSWERS, 1)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": drawn["mask"],
        "completion_mask": drawn["mask"],
        "advantages": drawn["advantages"],
        "old_per_token_logps": drawn["old"],
        "ref_per_token_logps": drawn["reference"],
        "num_items_in_batch": drawn["mask"].sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


# Our settings over the preset's, trl's loss, and its settings.
CASES = {
    "grpo": ({}, "grpo", {"beta": 0.04}),
    "grpo, unbiased": (
        {"kl": {"estimator": "ratio_k3"}},
        "grpo",
        {"beta": 0.04, "unbiased": True},
    ),
    "dapo": ({}, "dapo", {"epsilon_high": 0.28}),
    "dr_grpo": ({"constant_length": CONSTANT}, "dr_grpo", {}),
    "cispo": ({"clip_high": 0.1}, "cispo", {"epsilon_high": 1.1}),  # trl's is the bound itself
    "gspo": (
        {"clip_low": 0.02, "clip_high": 0.03},
        "grpo",
        {"level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_loss_and_gradient_are_trls(case, seed):
    changes, loss_type, settings = CASES[case]
    config = PolicyConfig.model_validate({"preset": case.split(",")[0], **changes})
    drawn = draw(seed)
    found, expected = (drawn["log_p"].clone().requires_grad_() for _ in range(2))
    loss, other = mine(config, drawn, found), trls(loss_type, drawn, expected, **settings)
    loss.backward()
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-9)
    assert torch.allclose(found.grad, expected.grad, rtol=1e-9, atol=1e-12)
    assert found.grad.abs().sum() > 0


def test_every_preset_is_settings_with_all_names():
    for name in PRESETS:
        config = PolicyConfig.model_validate({"preset": name})
        assert config.ratio in RATIOS and config.surrogate in SURROGATES
        assert config.reduction in REDUCTIONS and config.kl.estimator in ESTIMATORS
        again = PolicyConfig.model_validate(config.model_dump())
        assert again == config


def test_minimind_spo_is_reinforce_and_k3():
    config = PolicyConfig.model_validate({"preset": "spo_minimind"})
    drawn = draw(3)
    log_p, mask = drawn["log_p"], drawn["mask"]
    r = drawn["reference"] - log_p
    per_token = -log_p * drawn["advantages"][:, None] + 0.02 * (r.exp() - r - 1)
    expected = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    assert mine(config, drawn, log_p).item() == pytest.approx(expected.item(), rel=1e-12)


def test_trap_old_log_p_taken_after_the_update_clips_nothing():
    """With the old ones of before, the second update's ratios leave the bounds and are cut."""
    drawn = draw(4)
    config = PolicyConfig.model_validate({"preset": "dapo"})
    after = drawn["log_p"]
    for old, moved in ((drawn["old"], True), (after, False)):
        log_p = after.clone().requires_grad_()
        ratio = RATIOS["token"](log_p.flatten(), old.flatten(), None).exp()
        assert bool((ratio != 1).any()) is moved
        result = SURROGATES["clip"](
            ratio.log(),
            log_p.flatten(),
            drawn["advantages"].repeat_interleave(LONGEST),
            low=config.clip_low,
            high=config.clip_high,
        )
        assert bool((result.below | result.above).any()) is moved


def test_trap_length_bias_by_analytic_gradients():
    """Two answers of 2 and 8 tokens on policy: what a token's log p is pulled by."""
    drawn = {
        "log_p": torch.full((2, 8), -1.0, dtype=torch.float64),
        "old": torch.full((2, 8), -1.0, dtype=torch.float64),
        "reference": torch.full((2, 8), -1.0, dtype=torch.float64),
        "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
        "mask": (torch.arange(8) < torch.tensor([[2], [8]])).double(),
    }
    expected = {  # per token of the short and the long answer
        "sequence_mean": (1 / (2 * 2), 1 / (2 * 8)),  # a long wrong answer is punished less
        "token_mean": (1 / 10, 1 / 10),
        "constant_length": (1 / (2 * 5), 1 / (2 * 5)),
    }
    positions = torch.arange(8).expand(2, 8)
    for reduction, (short, long) in expected.items():
        log_p = drawn["log_p"].clone().requires_grad_()
        numbers = torch.arange(2).repeat_interleave(8)
        ratio = RATIOS["token"](log_p.flatten(), drawn["old"].flatten(), None)
        losses = SURROGATES["clip"](
            ratio, log_p.flatten(), drawn["advantages"][numbers], low=0.2, high=0.2
        ).losses
        weights, divisor = REDUCTIONS[reduction](drawn["mask"], positions, 5)
        ((losses * weights.flatten()).sum() / divisor).backward()
        assert log_p.grad[0, :2].tolist() == pytest.approx([-short] * 2)
        assert log_p.grad[1].tolist() == pytest.approx([long] * 8)
        assert (log_p.grad[0, 2:] == 0).all()


def test_a_sequence_ratio_takes_what_other_ranks_hold():
    """Halves of answers on two ranks: ratios of the whole, from sums that are added."""
    drawn = draw(5)
    flat = {name: drawn[name].flatten() for name in ("log_p", "old", "mask")}
    numbers = torch.arange(ANSWERS).repeat_interleave(LONGEST)
    whole = RATIOS["sequence"](flat["log_p"], flat["old"], Answers(flat["mask"], numbers, ANSWERS))
    parts = [torch.arange(len(numbers)) % 2 == rank for rank in range(2)]
    sums: list[torch.Tensor] = []

    def of(part: torch.Tensor, summed) -> torch.Tensor:
        answers = Answers(flat["mask"][part], numbers[part], ANSWERS, summed)
        return RATIOS["sequence"](flat["log_p"][part], flat["old"][part], answers)

    for part in parts:
        of(part, lambda values: sums.append(values.clone()) or values)
    for part in parts:
        assert torch.allclose(of(part, lambda values: sums[0] + sums[1]), whole[part], rtol=1e-12)

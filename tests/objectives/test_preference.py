"""The losses of pairs against trl's numbers, and by hand."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from equilibrium_mcore.objectives.preference import Answers, dpo, ipo, orpo, simpo

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # said once, of a library in a test
PAIRS, LONGEST = 5, 9


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of tokens, [2 * PAIRS, LONGEST]: chosen answers first; and which count."""
    generator = torch.Generator().manual_seed(seed)
    log_p = -torch.rand(2 * PAIRS, LONGEST, generator=generator, dtype=torch.float64) * 3
    lengths = torch.randint(1, LONGEST + 1, (2 * PAIRS,), generator=generator)
    mask = torch.arange(LONGEST) < lengths[:, None]
    return log_p * mask, mask


def answers(log_p: torch.Tensor, mask: torch.Tensor) -> Answers:
    (chosen, rejected), (n_chosen, n_rejected) = log_p.sum(1).chunk(2), mask.sum(1).chunk(2)
    return Answers(chosen, rejected, n_chosen, n_rejected)


def trl_dpo(loss_type: str, beta: float, policy, reference, mask) -> float:
    """trl's DPOTrainer on given log-probabilities: its loss alone, with stubs around it."""
    from trl import DPOTrainer

    def same(value):
        return value

    log_p, other = policy
    padded = torch.nn.functional.pad(mask.long(), (1, 0))  # the first token is never predicted
    outputs = SimpleNamespace(
        log_probs=log_p,
        entropy=torch.zeros_like(log_p),
        mean_logits=torch.zeros_like(log_p),
        is_top1=mask,
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": padded,
        "attention_mask": padded,
        "completion_mask": padded,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False).item()


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(("name", "loss"), [("sigmoid", dpo), ("ipo", ipo)])
def test_trap_dpo_and_ipo_have_trls_numbers(name, loss, beta):
    log_p, mask = draw(1)
    reference = draw(2)[0].abs().neg() * mask
    settings = {"beta": beta, **({"label_smoothing": 0.0} if loss is dpo else {})}
    mine = loss(answers(log_p, mask), answers(reference, mask), **settings).mean().item()
    expected = trl_dpo(name, beta, (log_p, mask), reference, mask)
    assert mine == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_trap_simpo_and_smoothing_have_trls_numbers(beta):
    from trl.experimental.cpo import CPOTrainer

    log_p, mask = draw(3)
    found = answers(log_p, mask)
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        simpo_gamma=0.8,
        beta=beta,
        label_smoothing=0.0,
    )
    expected = CPOTrainer.cpo_loss(trainer, found.mean_chosen, found.mean_rejected)[0]
    assert torch.allclose(simpo(found, beta=beta, gamma=0.8), expected, rtol=1e-12)
    # cDPO is the same function of another margin.
    trainer.loss_type, trainer.label_smoothing = "sigmoid", 0.2
    expected = CPOTrainer.cpo_loss(trainer, found.chosen, found.rejected)[0]
    nothing = answers(torch.zeros_like(log_p), mask)
    mine = dpo(found, nothing, beta=beta, label_smoothing=0.2)
    assert torch.allclose(mine, expected, rtol=1e-12)


def test_trap_orpo_has_trls_numbers():
    from trl.experimental.orpo import ORPOTrainer

    log_p, mask = draw(4)
    found = answers(log_p, mask)
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    odds = ORPOTrainer.odds_ratio_loss(trainer, found.mean_chosen, found.mean_rejected)[0]
    expected = -found.mean_chosen.float() - odds  # trl's loss is NLL minus beta * log sigmoid
    assert torch.allclose(orpo(found, beta=0.3).float(), expected, rtol=1e-5)


def test_by_hand():
    one = torch.tensor([1.0])
    policy = Answers(-one, -3 * one, one, 2 * one)
    reference = Answers(-2 * one, -2 * one, one, 2 * one)
    assert dpo(policy, reference, beta=0.5, label_smoothing=0.0).item() == pytest.approx(
        math.log(1 + math.exp(-1.0))
    )
    # chosen 1 per token above the reference, rejected 0.5 below
    assert ipo(policy, reference, beta=1.0).item() == pytest.approx((1.5 - 0.5) ** 2)


def test_trap_ipo_and_simpo_are_of_means_and_dpo_of_sums():
    """A rejected answer of twice the length, as likely per token."""
    log_p, mask = draw(5)
    found, reference = answers(log_p, mask), answers(draw(6)[0] * mask, mask)

    def longer(a: Answers) -> Answers:
        return Answers(a.chosen, 2 * a.rejected, a.chosen_tokens, 2 * a.rejected_tokens)

    pair = longer(found), longer(reference)
    assert torch.equal(ipo(*pair, beta=0.1), ipo(found, reference, beta=0.1))
    assert torch.equal(simpo(pair[0], beta=2.0, gamma=1.0), simpo(found, beta=2.0, gamma=1.0))
    assert torch.equal(orpo(pair[0], beta=0.1), orpo(found, beta=0.1))
    smoothed = {"beta": 0.1, "label_smoothing": 0.0}
    assert not torch.allclose(dpo(*pair, **smoothed), dpo(found, reference, **smoothed))

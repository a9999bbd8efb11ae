"""Drawing tokens: the right distribution, the same draw wherever it is made."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equilibrium_mcore.generation.interface import Prompt, Request, Sampling
from equilibrium_mcore.generation.sampling import draw, gumbel, row_seeds, supported

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
LOGITS = torch.tensor([1.5, -0.5, 0.0, 2.0, 0.7, -3.0])
DRAWS = 10_000


def drawn(logits: torch.Tensor, vocab_size: int | None = None, first: int = 0, **settings):
    """A draw for each row of `logits`, all at position 0 of samples `first` and on."""
    sampling = Sampling(seed=3, max_new_tokens=1, stop_ids=(), **settings)
    prompt = Prompt.of([1, 2])
    rows = [Request(prompt, first + number) for number in range(len(logits))]
    return draw(
        logits,
        sampling=sampling,
        seeds_R=torch.from_numpy(row_seeds(rows, sampling)),
        positions_R=torch.zeros(len(logits), dtype=torch.long),
        vocab_size=vocab_size or logits.shape[1],
        tp_group=ALONE,
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}])
def test_frequencies_are_the_probabilities(settings):
    found = drawn(LOGITS.expand(DRAWS, -1), **settings)
    scaled = LOGITS / settings.get("temperature", 1.0)
    if found.support is not None:
        assert 1 < found.support[0].sum() < len(LOGITS)
        scaled = scaled.masked_fill(~found.support[0], -torch.inf)
    p = scaled.softmax(0)
    shares = torch.bincount(found.ids, minlength=len(p)) / DRAWS
    spread = (p * (1 - p) / DRAWS).sqrt()
    assert ((shares - p).abs() <= 5 * spread).all()
    torch.testing.assert_close(found.logprobs, p.log()[found.ids])


def test_trap_the_temperature_is_in_the_log_probabilities():
    found = drawn(LOGITS.expand(8, -1), temperature=0.6)
    torch.testing.assert_close(found.logprobs, (LOGITS / 0.6).log_softmax(0)[found.ids])


def test_trap_log_probabilities_are_of_the_kept_support():
    found = drawn(LOGITS.expand(8, -1), top_p=0.8)
    kept = found.support[0]
    assert kept.tolist() == [True, False, False, True, True, False]
    within = LOGITS.masked_fill(~kept, -torch.inf).log_softmax(0)
    torch.testing.assert_close(found.logprobs, within[found.ids])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 4}])
def test_trap_rows_that_pad_the_vocabulary_are_never_drawn(settings):
    padded = torch.cat([LOGITS, torch.full((3,), 20.0)]).expand(2000, -1)
    found = drawn(padded, vocab_size=len(LOGITS), **settings)
    expected = drawn(LOGITS.expand(2000, -1), **settings)
    assert torch.equal(found.ids, expected.ids) and int(found.ids.max()) < len(LOGITS)
    torch.testing.assert_close(found.logprobs, expected.logprobs)


def test_the_likeliest_at_temperature_0_and_of_equal_ones_the_first():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 1.0, 2.0, 2.0]])
    found = drawn(logits, temperature=0.0, top_k=2, top_p=0.5)
    assert found.ids.tolist() == [1, 0] and found.support is None
    torch.testing.assert_close(
        found.logprobs, logits.log_softmax(1).gather(1, found.ids[:, None])[:, 0]
    )


def test_support_is_the_fewest_likeliest():
    """Against lists, ties and all."""
    random = np.random.default_rng(4)
    for top_k, top_p in ((0, 0.5), (3, 1.0), (4, 0.7), (1, 0.1), (9, 0.999)):
        logits = torch.from_numpy(random.integers(-2, 3, (50, 9)).astype(np.float64))
        found = supported(logits, top_k=top_k, top_p=top_p)
        for row, kept in zip(logits.tolist(), found.tolist(), strict=True):
            order = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))
            order = order[: top_k or len(row)]
            weights = [np.exp(row[i]) for i in order]
            expected, total = [], 0.0
            for i, weight in zip(order, weights, strict=True):
                if expected and total >= top_p:
                    break
                expected.append(i)
                total += weight / sum(weights)
            assert [i for i, is_kept in enumerate(kept) if is_kept] == sorted(expected)


def test_a_slice_of_the_vocabulary_has_its_own_noise():
    seeds, positions = torch.tensor([5, -7]), torch.tensor([0, 9])
    whole = gumbel(seeds, positions, first=0, width=300)
    assert torch.equal(gumbel(seeds, positions, first=100, width=50), whole[:, 100:150])
    assert torch.isfinite(whole).all()


def test_the_noise_is_of_seed_prompt_sample_and_position():
    sampling = Sampling(seed=3, max_new_tokens=1, stop_ids=())
    first = Request(Prompt.of([1, 2]))
    others = [
        (Request(Prompt.of([1, 2]), 1), 3),
        (Request(Prompt.of([2, 1])), 3),
        (first, 4),
    ]
    seeds = [row_seeds([first], sampling)]
    for request, seed in others:
        seeds.append(row_seeds([request], Sampling(seed=seed, max_new_tokens=1, stop_ids=())))
    rows = torch.from_numpy(np.concatenate([*seeds, seeds[0]]))
    noise = gumbel(rows, torch.tensor([0, 0, 0, 0, 1]), first=0, width=4000)
    related = torch.corrcoef(noise) - torch.eye(5)
    assert related.abs().max() < 0.1  # of 4,000 independent values, one in billions
    assert noise.mean() == pytest.approx(0.5772, abs=0.05)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.1)


def test_rounding_of_logits_hardly_moves_a_token():
    """An inverse cumulative distribution moves some tokens in ten thousand at this noise."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 500, generator=generator)
    noise = torch.randn(logits.shape, generator=generator) * 1e-6
    assert torch.equal(drawn(logits).ids, drawn(logits + noise).ids)

"""Log-probabilities and entropies of logits in slices: torch.log_softmax's, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equilibrium_mcore.parallel.launch import RankInfo

PADDED = 48
# Rows that only pad: the last few; all of the second of two ranks, and some of the first; none.
SIZES = (41, 20, PADDED)
TEMPERATURES = (1.0, 0.6)
CUTS = (
    False,
    True,
)  # some tokens' ids, of which a rank may hold none, are all they were drawn from
CASES = [(size, temperature, cut) for size in SIZES for temperature in TEMPERATURES for cut in CUTS]


def made_up(vocab_size: int) -> dict[str, Tensor]:
    """Logits [2, 5, 48] that are largest where the vocabulary is padded, labels, weights."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(2, 5, PADDED, generator=generator, dtype=torch.float64)
    logits[..., vocab_size:] += 5
    labels = torch.randint(vocab_size, (2, 5), generator=generator)
    labels[0, 0], labels[0, 1] = 0, vocab_size - 1
    weights = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    return {"logits": logits, "labels": labels, "weights": weights}


def made_up_support(labels: Tensor, vocab_size: int) -> Any:
    """Of each token: all ids, its label alone, or a part in which its label is."""
    from equilibrium_mcore.models.support import Support

    kept = []
    for place, label in enumerate(labels.flatten().tolist()):
        others = {0: [], 1: [label], 2: [label, *range(place, vocab_size, 3)]}[place % 3]
        kept.append(sorted(set(others)))
    ids = torch.tensor([i for part in kept for i in part], dtype=torch.int32)
    return Support(ids, torch.tensor([len(part) for part in kept]))


def expected(vocab_size: int, temperature: float, cut: bool) -> dict[str, Tensor]:
    case = made_up(vocab_size)
    logits = case["logits"].requires_grad_()
    scaled = logits[..., :vocab_size] / temperature
    if cut:
        support = made_up_support(case["labels"], vocab_size)
        bound = torch.zeros(10, vocab_size, dtype=torch.float64)
        for row, ids in zip(bound, support.ids.long().split(support.counts.tolist()), strict=True):
            if len(ids):
                row.fill_(-1e30)[ids] = 0
        scaled = scaled + bound.view_as(scaled)
    every = scaled.log_softmax(-1)
    values = every.gather(-1, case["labels"].unsqueeze(-1)).squeeze(-1)
    entropies = -(every.exp() * every).sum(-1)
    return _outcome(values, entropies, logits, case["weights"])


def _outcome(
    values: Tensor, entropies: Tensor, logits: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    (of_values,) = torch.autograd.grad((values * weights[0]).sum(), logits, retain_graph=True)
    both = (values * weights[0] + entropies * weights[1]).sum()
    (of_both,) = torch.autograd.grad(both, logits)
    return {
        "values": values.detach(),
        "entropies": entropies.detach(),
        "gradient": of_values,
        "gradient of both": of_both,
    }


def found(groups: Any, vocab_size: int, temperature: float, cut: bool) -> dict[str, Tensor]:
    """The same from this rank's slice of the logits."""
    from equilibrium_mcore.models.logprobs import (
        label_log_probabilities,
        log_probabilities_and_entropies,
    )

    case = made_up(vocab_size)
    slices = case["logits"].chunk(groups.tp.size(), dim=-1)
    mine = slices[groups.tp.rank()].clone().requires_grad_()
    settings = dict(vocab_size=vocab_size, tp_group=groups.tp, temperature=temperature)
    if cut:
        support, width = made_up_support(case["labels"], vocab_size), mine.shape[-1]
        place = torch.arange(case["labels"].numel()).view_as(case["labels"])
        settings["outside_BSV"] = support.outside(
            place, first=groups.tp.rank() * width, width=width
        )
    values, entropies = log_probabilities_and_entropies(mine, case["labels"], **settings)
    alone = label_log_probabilities(mine, case["labels"], **settings)
    assert torch.equal(alone, values)
    outcome = _outcome(values, entropies, mine, case["weights"])
    (of_alone,) = torch.autograd.grad((alone * case["weights"][0]).sum(), mine)
    return {**outcome, "gradient": of_alone}


def on_tensor_ranks(rank_info: RankInfo) -> list[dict[str, Tensor]]:
    from equilibrium_mcore.config.schema import ParallelismConfig
    from equilibrium_mcore.parallel import process_groups

    groups = process_groups.join(rank_info, ParallelismConfig(tensor=rank_info.world_size), seed=1)
    outcomes = [found(groups, *case) for case in CASES]
    process_groups.destroy()
    return outcomes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rank_has_the_values_and_gradients_of_log_softmax(single_rank, case):
    torch.testing.assert_close(found(single_rank, *case), expected(*case))


def test_a_support_is_read_where_a_token_stands():
    """Context ranks ask for some places, in an order of their own."""
    from equilibrium_mcore.models.support import Support

    parts = [
        Support(torch.tensor([1, 4, 5], dtype=torch.int32), torch.tensor([2, 0, 1])),
        Support(torch.tensor([0], dtype=torch.int32), torch.tensor([0, 1])),
    ]
    outside = Support.joined(parts).outside(torch.tensor([[4, 1], [2, 0]]), first=4, width=2)
    assert outside.tolist() == [[[True, True], [False, False]], [[True, False], [False, True]]]


def test_tensor_ranks_have_the_values_and_gradients_of_log_softmax(ranks):
    first, second = ranks.run(2, on_tensor_ranks)
    for case, one, other in zip(CASES, first, second, strict=True):
        for name in ("values", "entropies"):
            assert torch.equal(one[name], other[name]), (case, name)
        joined = {name: torch.cat([one[name], other[name]], dim=-1) for name in one}
        whole = {name: one[name] if "grad" not in name else joined[name] for name in one}
        torch.testing.assert_close(whole, expected(*case), msg=lambda m, c=case: f"{c}: {m}")


def test_bfloat16_logits_are_normalised_in_float32(single_rank):
    from equilibrium_mcore.models.logprobs import label_log_probabilities

    case = made_up(41)
    logits = case["logits"].bfloat16().requires_grad_()
    settings = dict(vocab_size=41, tp_group=single_rank.tp)
    values = label_log_probabilities(logits, case["labels"], **settings)
    wide = label_log_probabilities(logits.detach().float(), case["labels"], **settings)
    assert values.dtype == torch.float32 and torch.equal(values.detach(), wide)
    values.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert not logits.grad[..., 41:].any()

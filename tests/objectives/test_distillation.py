"""Distillation's losses against `F.kl_div`, autograd, and the same vocabulary in slices."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equilibrium_mcore.objectives.distillation import (
    WHOLE,
    Across,
    Losses,
    Mixture,
    TopK,
    distillation_losses,
)
from equilibrium_mcore.parallel.launch import RankInfo

N, V, PADDED = 12, 37, 56
KINDS = [(d, t, k) for d in ("forward", "reverse") for t in (1.0, 4.0) for k in (None, 5)]


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, [N, PADDED], and labels [N]."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(N, PADDED, generator=draw).double() for _ in range(2))
    return student, teacher, torch.randint(V, (N,), generator=draw)


def likeliest(teacher: Tensor, k: int, temperature: float) -> TopK:
    log_q = F.log_softmax(teacher[:, :V] / temperature, dim=-1)
    values, ids = log_q.topk(k)
    rest = log_q.exp().scatter(1, ids, 0.0).sum(-1, keepdim=True).log()
    return TopK(ids, torch.cat([values, rest], dim=1))


def bins(log_p: Tensor, top: TopK) -> Tensor:
    """log p of each likeliest id, and of the rest."""
    rest = log_p.exp().scatter(1, top.places, 0.0).sum(-1, keepdim=True).log()
    return torch.cat([log_p.gather(1, top.places), rest], dim=1)


def oracle(
    student: Tensor, teacher: Tensor, labels: Tensor, mixture: Mixture, k: int | None
) -> Losses:
    """The definition, by PyTorch's own functions and over real ids only."""
    log_p = F.log_softmax(student[:, :V] / mixture.temperature, dim=-1)
    log_q = F.log_softmax(teacher[:, :V] / mixture.temperature, dim=-1)
    if k is not None:
        top = likeliest(teacher, k, mixture.temperature)
        log_p, log_q = bins(log_p, top), top.log_q
    given, target = (log_p, log_q) if mixture.direction == "forward" else (log_q, log_p)
    apart = F.kl_div(given, target, reduction="none", log_target=True).sum(-1)
    label = F.cross_entropy(student[:, :V], labels, reduction="none")
    a = mixture.cross_entropy
    return Losses(a * label + (1 - a) * mixture.temperature**2 * apart, label, apart)


def ours(
    student: Tensor, teacher: Tensor, labels: Tensor, mixture: Mixture, k: int | None, **options
) -> Losses:
    def of(rows: slice) -> Tensor | TopK:
        if k is None:
            return teacher[rows]
        return TopK(*(part[rows] for part in likeliest(teacher, k, mixture.temperature)))

    return distillation_losses(student, labels, of, mixture=mixture, real=V, **options)


@pytest.mark.parametrize(("direction", "temperature", "k"), KINDS)
@pytest.mark.parametrize("a", [0.0, 0.3])
def test_values_and_gradients_are_those_of_kl_div(direction, temperature, k, a):
    student, teacher, labels = draw()
    student.requires_grad_()
    mixture = Mixture(a, temperature, direction)
    weight = torch.linspace(0, 2, N).double()
    expected = oracle(student, teacher, labels, mixture, k)
    (slope,) = torch.autograd.grad((expected.total * weight).sum(), student)
    for rows in (None, 5, 1):  # the last chunk of 5 is short
        found = ours(student, teacher, labels, mixture, k, rows=rows)
        (ours_slope,) = torch.autograd.grad((found.total * weight).sum(), student)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours_slope, slope, rtol=1e-9, atol=1e-12)
        assert not ours_slope[:, V:].any()


def test_a_teacher_that_is_the_student_is_not_apart():
    student, _, labels = draw()
    student.requires_grad_()
    for direction, temperature, k in KINDS:
        mixture = Mixture(0.0, temperature, direction)
        found = ours(student, student.detach(), labels, mixture, k)
        (slope,) = torch.autograd.grad(found.total.sum(), student)
        assert found.total.abs().max() < 1e-10 and slope.abs().max() < 1e-10


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_trap_distillation_without_t_squared(direction):
    """As T grows, T^2 times the gradient tends to (x - y) / V of centred logits, and stays.

    Hinton et al., equation 4. Without T^2 the gradient at T = 4 would be a sixteenth of that.
    """
    student, teacher, labels = draw()
    student, teacher = (0.05 * (x - x[:, :V].mean(1, keepdim=True)) for x in (student, teacher))
    student.requires_grad_()
    limit = ((student - teacher)[:, :V] / V).norm().detach()
    for temperature in (1.0, 4.0):
        mixture = Mixture(0.0, temperature, direction)
        found = ours(student, teacher, labels, mixture, None)
        (slope,) = torch.autograd.grad(found.total.sum(), student)
        assert (slope.norm() / limit).item() == pytest.approx(1.0, rel=0.05)


def test_an_id_that_neither_rests_nor_ranks_has_no_infinite_loss():
    """A student that is sure of the teacher's ids, and a teacher whose ids are all there are."""
    student = torch.zeros(1, PADDED)
    student[0, :5] = 200.0  # the rest is below float32
    top = TopK(torch.arange(5)[None], torch.tensor([[*[0.1] * 5, 0.5]]).log())
    for direction in ("forward", "reverse"):
        mixture = Mixture(0.5, 1.0, direction)
        student.requires_grad_()
        found = distillation_losses(
            student, torch.tensor([1]), lambda rows: top, mixture=mixture, real=V
        )
        (slope,) = torch.autograd.grad(found.total.sum(), student)
        assert all(part.isfinite().all() for part in found) and slope.isfinite().all()
    whole = likeliest(draw()[1], V, 1.0)
    assert whole.log_q[:, -1].isinf().all()
    for direction in ("forward", "reverse"):
        found = distillation_losses(
            draw()[0], draw()[2], lambda r: TopK(*(p[r] for p in whole)),
            mixture=Mixture(0.0, 1.0, direction), real=V,
        )  # fmt: skip
        expected = oracle(*draw(), Mixture(0.0, 1.0, direction), None)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-9)


def of_slice(tp_group: Any, kind: tuple, across: Across) -> dict[str, Any]:
    """Losses and gradient of this rank's slice."""
    direction, temperature, k = kind
    student, teacher, labels = draw()
    width = PADDED // tp_group.size()
    first = tp_group.rank() * width
    mine = slice(first, first + width)

    def of(rows: slice) -> Tensor | TopK:
        if k is None:
            return teacher[rows, mine]
        top = likeliest(teacher, k, temperature)
        return TopK(top.places[rows] - first, top.log_q[rows])

    local = student[:, mine].clone().requires_grad_()
    found = distillation_losses(
        local,
        labels - first,
        of,
        mixture=Mixture(0.3, temperature, direction),
        real=min(max(V - first, 0), width),
        across=across,
        rows=7,
    )
    (slope,) = torch.autograd.grad(found.total.sum(), local)
    return {"losses": [part.tolist() for part in found], "slope": slope}


def all_kinds(rank_info: RankInfo) -> list[dict[str, Any]]:
    """Every kind one after the other, and the first with each slice taken for the whole."""
    from equilibrium_mcore.config.schema import ParallelismConfig
    from equilibrium_mcore.parallel import process_groups
    from equilibrium_mcore.training.distillation import across_ranks

    layout = ParallelismConfig(tensor=rank_info.world_size)
    tp = process_groups.join(rank_info, layout, seed=0).tp
    found = [of_slice(tp, kind, across_ranks(tp)) for kind in KINDS]
    found.append(of_slice(tp, KINDS[0], WHOLE))
    process_groups.destroy()
    return found


def test_trap_a_partial_softmax_under_tensor_parallelism(ranks):
    """Slices of 14 of 56 rows, the last of them padding alone: the numbers of the whole."""
    results = ranks.run(4, all_kinds)
    student, teacher, labels = draw()
    student.requires_grad_()

    def right(number: int, kind: tuple) -> bool:
        direction, temperature, k = kind
        expected = oracle(student, teacher, labels, Mixture(0.3, temperature, direction), k)
        (slope,) = torch.autograd.grad(expected.total.sum(), student)
        found = torch.cat([result[number]["slope"] for result in results], dim=1)
        near = partial(torch.allclose, rtol=1e-9, atol=1e-12)
        losses = [torch.tensor(result[number]["losses"], dtype=torch.float64) for result in results]
        return near(found, slope) and all(near(one, torch.stack(expected)) for one in losses)

    assert all(right(number, kind) for number, kind in enumerate(KINDS))
    assert not right(len(KINDS), KINDS[0])  # the comparison sees the fault

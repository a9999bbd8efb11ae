"""How far a student's next token is from a teacher's, in distribution, on slices of a vocabulary.

    loss = a * cross-entropy of the label + (1 - a) * T^2 * divergence             arXiv 1503.02531
    forward   sum_v q log(q / p)        reverse   sum_v p log(p / q)               arXiv 2306.08543

p is the student's distribution and q the teacher's, both of logits / T; T^2 keeps the size of the
gradient. Of a teacher of whom only the likeliest ids are known, the bins are these ids and the rest
of the vocabulary as one.

Shapes: N tokens, V the real ids in this slice of the vocabulary (0 or more), K likeliest ids.
`across` joins slices: results per token are whole, and the same for each slice. Gradients are by
the student's logits of the slice, as those of one result that all slices share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Direction = Literal["forward", "reverse"]
LEAST_LOG = -1e4  # of a teacher's rest that is empty: finite, so that 0 times it is 0
CHUNK_ELEMENTS = 2**22  # of logits that are looked at in float32 at once


class Across(NamedTuple):
    """Joins what slices of the vocabulary say of each token: sums, and largest values, [N]."""

    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]


WHOLE = Across(lambda values: values, lambda values: values)
"""One slice is the whole vocabulary."""


class TopK(NamedTuple):
    """A teacher's likeliest ids by their places in this slice, and log q of all bins.

    places: int64 [N, K]; those that are not from 0 to V - 1 are other slices'.
    log_q: [N, K + 1], the rest of the vocabulary last.
    """

    places: Tensor
    log_q: Tensor


class Distance(NamedTuple):
    """`value` [N], and its gradient [N, V] by logits / T of the student."""

    value: Tensor
    slope: Tensor


class Losses(NamedTuple):
    """Per token in nats, [N]; gradients flow through `total` alone."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor  # at temperature T, without T^2


@dataclass(frozen=True)
class Mixture:
    """What is mixed: `cross_entropy` is its weight a, from 0 to 1; `temperature` T is above 0."""

    cross_entropy: float
    temperature: float
    direction: Direction


def log_softmax(logits_NV: Tensor, *, temperature: float, across: Across) -> Tensor:
    """log p of the slice's ids, [N, V], float32 or wider. Collective."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    x_NV = logits_NV.to(wide, copy=True).div_(temperature)
    largest_N = x_NV.new_full(x_NV.shape[:1], -torch.inf)
    if x_NV.shape[1]:
        largest_N = x_NV.amax(-1)
    x_NV -= across.max(largest_N)[:, None]
    total_N = across.sum(x_NV.exp().sum(-1))
    return x_NV.sub_(total_N.log()[:, None])


def cross_entropy(log_p_NV: Tensor, places_N: Tensor, *, across: Across) -> Distance:
    """-log p of the label, which is at `places_N` of the slice that holds it. Collective."""
    here_N1, index_N1 = _here(places_N[:, None], log_p_NV)
    slope_NV = log_p_NV.exp()
    if log_p_NV.shape[1]:
        of_label_N = torch.where(here_N1, log_p_NV.gather(1, index_N1), 0.0).squeeze(1)
        slope_NV.scatter_add_(1, index_N1, -here_N1.to(slope_NV.dtype))
    else:
        of_label_N = log_p_NV.sum(1)
    return Distance(-across.sum(of_label_N), slope_NV)


def divergence(
    log_p_NV: Tensor, log_q_NV: Tensor, *, direction: Direction, across: Across
) -> Distance:
    """Over the whole vocabulary. Collective."""
    ratio_NV = log_p_NV - log_q_NV
    if direction == "forward":
        q_NV = log_q_NV.exp()
        value_N = -across.sum((q_NV * ratio_NV).sum(-1))
        return Distance(value_N, log_p_NV.exp() - q_NV)
    p_NV = log_p_NV.exp()
    value_N = across.sum((p_NV * ratio_NV).sum(-1))
    return Distance(value_N, p_NV * (ratio_NV - value_N[:, None]))


def top_k_divergence(
    log_p_NV: Tensor, teacher: TopK, *, direction: Direction, across: Across
) -> Distance:
    """Over the bins of the teacher's likeliest ids and of the rest. Collective.

    Where the rest of the student is too small for its dtype, its smallest number stands for it.
    """
    p_NV = log_p_NV.exp()
    here_NK, index_NK = _here(teacher.places, log_p_NV)
    log_q_NB = teacher.log_q.to(log_p_NV.dtype).clamp(min=LEAST_LOG)
    rest_NV, zeros_NK = p_NV.clone(), here_NK.to(p_NV.dtype) * 0
    of_ids_NK = zeros_NK
    if log_p_NV.shape[1]:
        of_ids_NK = torch.where(here_NK, log_p_NV.gather(1, index_NK), 0.0)
        rest_NV.scatter_add_(1, index_NK, torch.where(here_NK, -p_NV.gather(1, index_NK), zeros_NK))
    joined_NB = across.sum(torch.cat([of_ids_NK, rest_NV.sum(-1, keepdim=True)], dim=1))
    tiny = torch.finfo(p_NV.dtype).tiny
    log_p_NB = torch.cat([joined_NB[:, :-1], joined_NB[:, -1:].clamp(min=tiny).log()], dim=1)
    ratio_NB = log_p_NB - log_q_NB
    if direction == "forward":
        q_NB = log_q_NB.exp()
        value_N = -(q_NB * ratio_NB).sum(-1)
        factor_NB = 1 - (-ratio_NB).exp()  # of p of each id in the bin
    else:
        value_N = (log_p_NB.exp() * ratio_NB).sum(-1)
        factor_NB = ratio_NB - value_N[:, None]
    slope_NV = rest_NV * factor_NB[:, -1:]
    if log_p_NV.shape[1]:
        of_bins_NK = p_NV.gather(1, index_NK) * factor_NB[:, :-1]
        if direction == "forward":
            of_bins_NK = p_NV.gather(1, index_NK) - q_NB[:, :-1]
        slope_NV.scatter_add_(1, index_NK, torch.where(here_NK, of_bins_NK, zeros_NK))
    return Distance(value_N, slope_NV)


def distillation_losses(
    logits_NV: Tensor,
    places_N: Tensor,
    teacher: Callable[[slice], Tensor | TopK],
    *,
    mixture: Mixture,
    real: int,
    across: Across = WHOLE,
    rows: int | None = None,
) -> Losses:
    """The losses of N tokens, looked at `rows` at a time. Collective.

    Kept for the backward pass is the gradient, of the logits' dtype; what else is needed is as
    large as a chunk.

    Args:
        logits_NV: the student's, of the slice with its padding.
        places_N: the labels by their places in the slice.
        teacher: of some tokens, the logits of the slice [n, V], or their likeliest ids.
        real: ids of the slice that are no padding: the first so many. Padding has no probability
            on either side, and no gradient.
    """
    settings = places_N, teacher, mixture, real, across, rows
    return Losses(*_Distilled.apply(logits_NV, *settings))


class _Distilled(torch.autograd.Function):
    """Values and the gradient together, chunk by chunk: no float32 copy of all logits is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        places_N: Tensor,
        teacher: Callable[[slice], Tensor | TopK],
        mixture: Mixture,
        real: int,
        across: Across,
        rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, width = logits_NV.shape
        rows = rows or max(1, CHUNK_ELEMENTS // max(1, width))
        slope_NV = torch.zeros_like(logits_NV) if ctx.needs_input_grad[0] else None
        parts = []
        for first in range(0, count, rows):
            of = slice(first, min(first + rows, count))
            losses, slope = _of_chunk(
                logits_NV[of, :real], places_N[of], teacher(of), mixture, real, across
            )
            parts.append(torch.stack(losses))
            if slope_NV is not None:
                slope_NV[of, :real] = slope
        values_3N = torch.cat(parts, dim=1)
        ctx.save_for_backward(slope_NV)
        total_N, cross_entropy_N, divergence_N = values_3N.unbind()
        ctx.mark_non_differentiable(cross_entropy_N, divergence_N)
        return total_N, cross_entropy_N, divergence_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total_N: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        (slope_NV,) = ctx.saved_tensors
        gradient_NV = slope_NV.mul_(of_total_N[:, None].to(slope_NV.dtype))
        return gradient_NV, None, None, None, None, None, None


def _of_chunk(
    logits_NV: Tensor,
    places_N: Tensor,
    teacher: Tensor | TopK,
    mixture: Mixture,
    real: int,
    across: Across,
) -> tuple[Losses, Tensor]:
    a, temperature, direction = mixture.cross_entropy, mixture.temperature, mixture.direction
    log_p_NV = log_softmax(logits_NV, temperature=temperature, across=across)
    if isinstance(teacher, TopK):
        apart = top_k_divergence(log_p_NV, teacher, direction=direction, across=across)
    else:
        log_q_NV = log_softmax(teacher[:, :real], temperature=temperature, across=across)
        apart = divergence(log_p_NV, log_q_NV, direction=direction, across=across)
    if temperature != 1:
        log_p_NV = log_softmax(logits_NV, temperature=1.0, across=across)
    label = cross_entropy(log_p_NV, places_N, across=across)
    total_N = a * label.value + (1 - a) * temperature**2 * apart.value
    # By the logits, a chain of 1 / T: T^2 / T.
    slope_NV = label.slope.mul_(a).add_(apart.slope, alpha=(1 - a) * temperature)
    return Losses(total_N, label.value, apart.value), slope_NV


def _here(places: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Which places are of this slice, and all of them moved into it."""
    width = log_p_NV.shape[1]
    here = (places >= 0) & (places < width)
    return here, places.clamp(0, max(0, width - 1))

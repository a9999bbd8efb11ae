"""Log-probabilities and entropies from logits that tensor-parallel ranks hold in parts.

Functions of logits alone: temperature divides them, rows that only pad the vocabulary are left out
of the normaliser, as are ids that a token could not be drawn from, and no rank ever holds the
logits of another. Gradients are those of `torch.log_softmax` over what is left; like
megatron-core's cross-entropy they take the gradient of the result to be the same on every tensor
rank, and need no communication.

Shapes: B batch, S sequence, V this rank's slice of the padded vocabulary, in rank order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def label_log_probabilities(
    logits_BSV: Tensor,
    labels_BS: Tensor,
    *,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup,
    temperature: float = 1.0,
    outside_BSV: Tensor | None = None,
) -> Tensor:
    """log p of each label in nats, [B, S], float32 or the logits' dtype if wider. Collective.

    Args:
        labels_BS: token ids below `vocab_size`.
        vocab_size: ids from here on are padding, of probability 0.
        tp_group: the ranks that hold the vocabulary; the result is the same on all of them.
        temperature: logits are divided by it, above 0.
        outside_BSV: bool, True for ids of this rank's slice that have probability 0 as well; never
            for all real ids of a token.
    """
    settings = vocab_size, tp_group, temperature, outside_BSV, False
    return _LabelLogProbabilities.apply(logits_BSV, labels_BS, *settings)[0]


def log_probabilities_and_entropies(
    logits_BSV: Tensor,
    labels_BS: Tensor,
    *,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup,
    temperature: float = 1.0,
    outside_BSV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`label_log_probabilities`, and the entropy in nats of the distribution they are of, [B, S]"""
    settings = vocab_size, tp_group, temperature, outside_BSV, True
    return _LabelLogProbabilities.apply(logits_BSV, labels_BS, *settings)


class _LabelLogProbabilities(torch.autograd.Function):
    """One copy of the logits in float32 is all that is kept: it becomes the probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BSV: Tensor,
        labels_BS: Tensor,
        vocab_size: int,
        tp_group: torch.distributed.ProcessGroup,
        temperature: float,
        outside_BSV: Tensor | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        width = logits_BSV.shape[-1]
        first = tp_group.rank() * width
        x_BSV = _exponents(
            logits_BSV,
            real=max(vocab_size - first, 0),
            temperature=temperature,
            outside_BSV=outside_BSV,
            group=tp_group,
        )
        index_BS1 = (labels_BS - first).unsqueeze(-1)
        here_BS1 = (index_BS1 >= 0) & (index_BS1 < width)
        index_BS1 = index_BS1.clamp(0, width - 1)
        of_label_BS = torch.where(here_BS1, x_BSV.gather(-1, index_BS1), 0.0).squeeze(-1)
        p_BSV = x_BSV.exp_()
        sums_2BS = torch.stack([of_label_BS, p_BSV.sum(-1)])
        _all_reduce(sums_2BS, tp_group)
        of_label_BS, total_BS = sums_2BS
        p_BSV /= total_BS.unsqueeze(-1)
        entropy_BS = None
        if with_entropy:
            entropy_BS = -torch.xlogy(p_BSV, p_BSV).sum(-1)
            _all_reduce(entropy_BS, tp_group)
        ctx.temperature, ctx.dtype = temperature, logits_BSV.dtype
        ctx.save_for_backward(p_BSV, index_BS1, here_BS1, entropy_BS)
        return of_label_BS - total_BS.log(), entropy_BS

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_value_BS: Tensor, of_entropy_BS: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        p_BSV, index_BS1, here_BS1, entropy_BS = ctx.saved_tensors
        of_value_BS1 = of_value_BS.unsqueeze(-1)
        x_BSV = p_BSV * -of_value_BS1
        x_BSV.scatter_add_(-1, index_BS1, of_value_BS1 * here_BS1)
        if entropy_BS is not None:  # dH / dx = -p (log p + H)
            slope_BSV = torch.xlogy(p_BSV, p_BSV).addcmul_(p_BSV, entropy_BS.unsqueeze(-1))
            x_BSV.addcmul_(slope_BSV, of_entropy_BS.unsqueeze(-1), value=-1)
        return x_BSV.div_(ctx.temperature).to(ctx.dtype), *[None] * 6


def _exponents(
    logits_BSV: Tensor,
    *,
    real: int,
    temperature: float,
    outside_BSV: Tensor | None,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """A copy, at most 0 and wide enough for sums of powers; -inf from this rank's row `real` on,
    and where `outside_BSV` says so."""
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    x_BSV = logits_BSV.to(wide, copy=True).div_(temperature)
    x_BSV[..., real:] = -torch.inf
    if outside_BSV is not None:
        x_BSV.masked_fill_(outside_BSV, -torch.inf)
    largest_BS = x_BSV.amax(-1)
    _all_reduce(largest_BS, group, torch.distributed.ReduceOp.MAX)
    return x_BSV.sub_(largest_BS.unsqueeze(-1))


def _all_reduce(
    values: Tensor,
    group: torch.distributed.ProcessGroup,
    operation: Any = torch.distributed.ReduceOp.SUM,
) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(values, op=operation, group=group)

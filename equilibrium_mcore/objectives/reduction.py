"""How the losses of many tokens become one: a weight for each token, and what their sum divides.

Shapes: B sequences, S positions. A row may hold several documents, packed; `positions_BS` restarts
at 0 in each. The weights are made of the whole micro-batch, before context parallelism cuts it, so
that a document's length is known on every rank.

    token_mean       sum over counted tokens / counted tokens of the global batch
    sequence_mean    mean over documents of the mean over their counted tokens
    constant_length  sum over counted tokens / (documents x a constant), arXiv 2503.20783
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def document_numbers(positions_BS: Tensor) -> Tensor:
    """A number for each position's document, 0, 1, ... over the rows in turn. int64 [B, S]."""
    starts = positions_BS == 0
    starts[:, 0] = True  # a row that begins inside a document still begins something
    return (starts.reshape(-1).cumsum(0) - 1).reshape(positions_BS.shape)


def counted_by_document(mask_BS: Tensor, positions_BS: Tensor) -> Tensor:
    """How many counted tokens each document has. float32 [documents]."""
    numbers = document_numbers(positions_BS).reshape(-1)
    totals = torch.zeros(int(numbers[-1]) + 1, dtype=mask_BS.dtype)
    return totals.index_add_(0, numbers, mask_BS.reshape(-1))


def token_mean(mask_BS: Tensor, positions_BS: Tensor, length: int | None) -> tuple[Tensor, float]:
    """Every counted token weighs 1; divided by their number."""
    return mask_BS, float(mask_BS.sum())


def sequence_mean(
    mask_BS: Tensor, positions_BS: Tensor, length: int | None
) -> tuple[Tensor, float]:
    """Every document weighs 1, whatever its length; one without counted tokens weighs nothing."""
    counted = counted_by_document(mask_BS, positions_BS)
    share = 1.0 / counted.clamp(min=1.0)
    return mask_BS * share[document_numbers(positions_BS)], float((counted > 0).sum())


def constant_length(
    mask_BS: Tensor, positions_BS: Tensor, length: int | None
) -> tuple[Tensor, float]:
    """Every counted token weighs 1, divided by documents times `length`."""
    if not length:
        raise ValueError("constant_length needs the length that it divides by")
    counted = counted_by_document(mask_BS, positions_BS)
    return mask_BS, float((counted > 0).sum()) * length


REDUCTIONS: dict[str, Callable[[Tensor, Tensor, int | None], tuple[Tensor, float]]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_length": constant_length,
}
"""(mask_BS, positions_BS, length) -> (weight_BS, this micro-batch's part of the divisor)."""

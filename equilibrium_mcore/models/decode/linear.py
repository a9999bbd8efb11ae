"""Linear layers on the few tokens of a step, where calls cost more than products."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def is_plain(linear: torch.nn.Module) -> bool:
    """Whether the layer is megatron-core's, whole on this rank, and nothing stands beside it."""
    return (
        type(linear) in (ColumnParallelLinear, RowParallelLinear)
        and linear.tp_group.size() == 1
        and linear.bias is None
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )


def output_of(linear: torch.nn.Module, x: Tensor) -> Tensor:
    """The layer's output, without its bias where it gives that apart; the same bits either way."""
    if is_plain(linear) and not torch.is_grad_enabled():
        return torch.matmul(x, linear.weight.t())
    return linear(x)[0]

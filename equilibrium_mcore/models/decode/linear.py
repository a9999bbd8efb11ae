"""Linear layers on the few tokens of a step, where calls cost more than products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def is_plain(linear: torch.nn.Module) -> bool:
    """Whether the layer is megatron-core's, whole on this rank, and nothing stands beside it."""
    return (
        type(linear) in (ColumnParallelLinear, RowParallelLinear)
        and linear.tp_group.size() == 1
        and linear.bias is None
        and not has_hooks(linear)
    )


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def quick(module: torch.nn.Module) -> Callable[..., Any]:
    """The module's `forward`, or the module where a call does more."""
    return module if has_hooks(module) else module.forward


def output_of(linear: torch.nn.Module, x: Tensor) -> Tensor:
    """The layer's output, without its bias where it gives that apart; the same bits either way."""
    if is_plain(linear) and not torch.is_grad_enabled():
        return torch.matmul(x, linear.weight.t())
    return linear(x)[0]

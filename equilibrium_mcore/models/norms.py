"""RMSNorm in plain PyTorch, as megatron-core's specs build norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight knows about sequence parallelism.

    Under sequence parallelism each TP rank sees a part of the sequence, so the gradients of the
    weight are partial; megatron-core sums those of parameters marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class GroupRMSNorm(torch.nn.Module):
    """RMSNorm over groups of channels: Mamba-2's norm before its output projection.

    Args:
        hidden_size: channels on this TP rank, split into hidden_size / group_size groups.
        group_size: channels per group; it must not depend on the layout, or the function does.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError("norm_before_gate=True is not supported: the gate comes first")
        self.group_size = group_size or hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., channels); channels may be a CP rank's part of whole groups."""
        grouped = x.unflatten(-1, (-1, self.group_size))
        normed = F.rms_norm(
            grouped.float() if x.dtype != torch.float64 else grouped,
            (self.group_size,),
            eps=self.eps,
        )
        return normed.flatten(-2).to(x.dtype) * self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """The weight, split over TP along its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

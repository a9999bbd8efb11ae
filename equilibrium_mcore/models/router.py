"""megatron-core's router, with a balancing loss over the global batch that no layout changes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PlainGating(torch.autograd.Function):
    """The router's product in PyTorch: megatron-core's own where Transformer Engine is absent.

    megatron-core takes Transformer Engine's product, in tf32, wherever that can be imported, also
    for a model that has no other module of it.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EH: Tensor, dtype: torch.dtype) -> Tensor:
        """(tokens, hidden) and (experts, hidden) -> (tokens, experts) in `dtype`."""
        ctx.save_for_backward(x_TH, weight_EH)
        return torch.mm(x_TH.to(dtype), weight_EH.to(dtype).t())

    @staticmethod
    def backward(ctx: Any, gradient_TE: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of both, in their own dtypes."""
        x_TH, weight_EH = ctx.saved_tensors
        dtype = gradient_TE.dtype
        of_x = torch.mm(gradient_TE, weight_EH.to(dtype)).to(x_TH.dtype)
        of_weight = torch.mm(gradient_TE.t(), x_TH.to(dtype)).to(weight_EH.dtype)
        return of_x, of_weight, None


class GlobalRouter(TopKRouter):
    """TopKRouter whose `global_aux_loss` is the loss of all data ranks' tokens, whoever has them.

    megatron-core 0.19.2 divides each rank's share by the tokens of all data ranks, and the sum over
    ranks by their number once more: on N data ranks the loss, its gradient and its figure are N
    times too small. Source of the loss: arXiv 2501.11873.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Logits (..., experts) in the router's dtype; of float32 tokens never in tf32.

        bf16 factors are exact in tf32, float32 ones are not: on an H100 an error of 1e-3 sent
        tokens to other experts than PyTorch's product did.
        """
        if self.config.transformer_impl != "local" and input.dtype != torch.float32:
            return super().gating(input)
        dtype = {"fp32": torch.float32, "fp64": torch.float64}[self.config.moe_router_dtype]
        logits = PlainGating.apply(input.reshape(-1, input.shape[-1]), self.weight, dtype)
        return logits.unflatten(0, input.shape[:-1])

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        *arguments: Any,
        **named: Any,
    ) -> Tensor:
        """Attach the loss to `activation` (tokens, experts), which it returns, and log it."""
        if aux_loss_name == "global_load_balancing_loss":
            aux_loss = aux_loss * (self.tp_dp_cp_group.size() // self.tp_cp_group.size())
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, *arguments, **named
        )


def forget_last_model() -> None:
    """Drop what megatron-core keeps of MoE layers for the process, which has one model's shapes.

    A figure for each layer, and the scale of the balancing loss: the first forward pass of the
    next model makes both again.
    """
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None

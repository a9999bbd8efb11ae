"""megatron-core's router, with a balancing loss over the global batch that no layout changes."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class GlobalRouter(TopKRouter):
    """TopKRouter whose `global_aux_loss` is the loss of all data ranks' tokens, whoever has them.

    megatron-core 0.19.2 divides each rank's share by the tokens of all data ranks, and the sum over
    ranks by their number once more: on N data ranks the loss, its gradient and its figure are N
    times too small. Source of the loss: arXiv 2501.11873.
    """

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
    next model makes both anew.
    """
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None

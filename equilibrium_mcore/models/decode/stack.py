"""A stack's layers while rows are being continued, with the fewest calls.

megatron-core's layers are made for every way to train; on the few tokens of a step their Python
takes longer than the products. What a layer comes down to is found once for a `DecodeState`, while
which no weight changes: a norm, what mixes, and the sum with what came in. The same products and
sums in the same order, so the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from equilibrium_mcore.models.decode.linear import quick
from equilibrium_mcore.models.decode.moe import feed_forward
from equilibrium_mcore.models.decode.state import DecodeState

# (normed, state, angles) -> output and bias, as the layer's own module.
Mixing = Callable[[Tensor, DecodeState, Tensor | None], tuple[Tensor, Tensor | None]]


class DecodingStack(HybridStack):
    """megatron-core's HybridStack, with decoding of our own."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_context: object = None,
        rotary_pos_emb: Tensor | None = None,
        **named: object,
    ) -> Tensor:
        """The layers and the last norm; with a `DecodeState` and nothing to train, by `decode`."""
        config = self.config
        if (
            not isinstance(inference_context, DecodeState)
            or self.training
            or torch.is_grad_enabled()
            or config.fp8
            or config.fp4
            or config.fp32_residual_connection
        ):
            return super().forward(
                hidden_states, attention_mask, inference_context, rotary_pos_emb, **named
            )
        if not self.pre_process:
            hidden_states = self.input_tensor
        return self.decode(hidden_states, inference_context, rotary_pos_emb)

    def decode(self, hidden: Tensor, state: DecodeState, rotary_pos_emb: Tensor | None) -> Tensor:
        """(tokens / SP, 1, hidden) -> the same shape."""
        layers = state.once(self, lambda: [_parts(layer) for layer in self.layers])
        for norm, mix in layers:
            output, bias = mix(norm(hidden), state, rotary_pos_emb)
            hidden = hidden + (output if bias is None else output + bias)
        return self.final_norm(hidden) if self.post_process else hidden


def _parts(layer: torch.nn.Module) -> tuple[Callable[[Tensor], Tensor], Mixing]:
    """The norm of a layer, and what it does with normed tokens."""
    if isinstance(layer, MambaLayer):
        return quick(layer.norm), partial(_with_state, layer.mixer)
    assert isinstance(layer, TransformerLayer)
    if not isinstance(layer.self_attention, IdentityOp):
        return quick(layer.input_layernorm), partial(_with_state, layer.self_attention)
    mix = feed_forward(layer.mlp)
    return quick(layer.pre_mlp_layernorm), lambda x, state, angles: mix(x)


def _with_state(
    module: torch.nn.Module, x: Tensor, state: DecodeState, angles: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return module(x, inference_context=state, rotary_pos_emb=angles)

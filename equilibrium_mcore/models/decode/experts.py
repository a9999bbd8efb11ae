"""Experts one after the other on the few tokens that a step brings each of them.

megatron-core's SequentialMLP spends most of such a step on calls, not on products: here each expert
makes two products, and what lies between is done once for the tokens of all. The same products in
the same order, so the same bits.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from equilibrium_mcore.models.decode.linear import is_plain

LAYERS = ("linear_fc1", "linear_fc2")


class DecodingExperts(SequentialMLP):
    """SequentialMLP, with fewer calls where nothing trains."""

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens, hidden), tokens of each expert in turn -> (tokens, hidden), and no bias."""
        if self.training or torch.is_grad_enabled() or not self._are_plain():
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.tolist()
        inner = self._products(permuted_local_hidden_states, counts, LAYERS[0])
        if self.config.gated_linear_unit:
            gate, inner = inner.chunk(2, dim=-1)
            inner = self.config.activation_func(gate) * inner
        else:
            inner = self.config.activation_func(inner)
        inner = (inner * permuted_probs.unsqueeze(-1)).to(inner.dtype)
        return self._products(inner, counts, LAYERS[1]), None

    def _products(self, x: Tensor, counts: list[int], name: str) -> Tensor:
        """Each expert's layer of this name on its tokens."""
        weights = [expert._modules[name].weight for expert in self.local_experts]
        y = x.new_empty(len(x), weights[0].shape[0])
        parts = zip(x.split(counts), y.split(counts), weights, strict=True)
        for tokens, result, weight in parts:
            if len(tokens):
                torch.mm(tokens, weight.t(), out=result)
        return y

    def _are_plain(self) -> bool:
        """Whether every expert is two weights of its own, and nothing stands beside them."""
        config = self.config
        if config.fp8 or config.fp4 or config.bias_activation_fusion or config.glu_linear_offset:
            return False
        if config.moe_apply_probs_on_input or config.activation_func_clamp_value is not None:
            return False
        return all(
            is_plain(expert._modules[name]) for expert in self.local_experts for name in LAYERS
        )

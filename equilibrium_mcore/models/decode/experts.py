"""Experts one after the other on the few tokens that a step brings each of them.

megatron-core's SequentialMLP spends most of such a step on calls, not on products: here each expert
makes two products, and what lies between is done once for the tokens of all. The same products in
the same order, so the same bits.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from equilibrium_mcore.models.decode.moe import LAYERS, activation, is_pair, products


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
        first, second = (
            [expert._modules[name].weight.t() for expert in self.local_experts] for name in LAYERS
        )
        inner = activation(self)(products(permuted_local_hidden_states, counts, first))
        inner = (inner * permuted_probs.unsqueeze(-1)).to(inner.dtype)
        return products(inner, counts, second), None

    def _are_plain(self) -> bool:
        """Whether every expert is two weights of its own, and nothing stands beside them."""
        if self.config.moe_apply_probs_on_input:
            return False
        return all(is_pair(expert) for expert in self.local_experts)

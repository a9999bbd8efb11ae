"""Core attention in plain PyTorch: causal, grouped, any key and value width, with CP and packing.

TP has split the heads before this module; CP splits the sequence, zigzag, so that each rank has as
much causal work. Here every CP rank gathers the whole sequence for its share of the heads (the
all-to-all of DeepSpeed-Ulysses, arXiv 2309.14509, as megatron-core's Mamba mixer does it).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_context_parallel import _all_to_all_cp2hp, _all_to_all_hp2cp
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from equilibrium_mcore.models.packing import to_rank_order, to_text_order


class TorchCoreAttention(torch.nn.Module):
    """softmax(q k^T * scale) v with a causal mask, over `scaled_dot_product_attention`.

    Built by megatron-core's attention layers through their specs; it has no parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"attn_mask_type={attn_mask_type}: only causal attention is built")
        if pg_collection is None:
            raise ValueError("pg_collection is None: process groups are passed, never defaulted")
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout={dropout}: only 0 is supported")
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query (s, b, n, d), key and value (s, b, g, ...): s is this CP rank's part.

        Returns (s, b, n * v). Packed input has shape (tokens, n, d) and returns (tokens, n * v).
        """
        packed = query.dim() == 3
        if packed:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        heads, groups = query.shape[2], key.shape[2]
        cp_size = self.cp_group.size()
        if groups % cp_size:  # fewer key/value heads than CP ranks: each query head brings its own
            key, value = (t.repeat_interleave(heads // groups, dim=2) for t in (key, value))
        query, key, value = (
            self._whole_sequence(t, packed_seq_params) for t in (query, key, value)
        )
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (b, n, s, d)
        mask = _document_mask(packed_seq_params)
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        context = context.permute(2, 0, 1, 3).flatten(2)  # (s, b, n v)
        if cp_size > 1:
            context = to_rank_order(context, cp_size, packed_seq_params)
            context = _all_to_all_hp2cp(context.contiguous(), self.cp_group)
        return context.squeeze(1) if packed else context.contiguous()

    def _whole_sequence(self, x: Tensor, packed_seq_params: PackedSeqParams | None) -> Tensor:
        """(s / cp, b, n, d) of all heads -> (s, b, n / cp, d) in the order of the text."""
        cp_size = self.cp_group.size()
        if cp_size == 1:
            return x
        width = x.shape[-1]
        x = _all_to_all_cp2hp(x.flatten(2).contiguous(), self.cp_group)
        x = to_text_order(x, cp_size, packed_seq_params)
        return x.unflatten(-1, (-1, width))


def _document_mask(packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """(1, 1, tokens, tokens), True where a token may look: back, within its own document."""
    if packed_seq_params is None:
        return None
    if packed_seq_params.seq_idx is None:
        raise ValueError("packed_seq_params.seq_idx is None: build it with total_tokens set")
    documents = packed_seq_params.seq_idx[0]
    same = documents.unsqueeze(0) == documents.unsqueeze(1)
    return same.tril().unsqueeze(0).unsqueeze(0)

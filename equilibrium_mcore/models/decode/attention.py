"""Grouped attention while decoding: the keys, turned, and the values of every token.

Shapes, of this TP rank: T tokens, R rows, L tokens of the longest, H query heads, G key and value
heads, D width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from equilibrium_mcore.models.decode.linear import output_of
from equilibrium_mcore.models.decode.state import Decodes, DecodeState, Prefill


class DecodingSelfAttention(Decodes, SelfAttention):
    """megatron-core's SelfAttention, with decoding of our own."""

    def decode(
        self, hidden_states: Tensor, state: DecodeState, *, rotary_pos_emb: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens / SP, 1, hidden) -> the same shape, and no bias."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)  # (T, 1, heads, D)
        work = state.work
        if rotary_pos_emb is not None:
            angles = rotary_pos_emb[_positions(work)]
            query, key = (
                apply_rotary_pos_emb(t, angles, self.config, cp_group=self.pg_collection.cp)
                for t in (query, key)
            )
        query, key, value = (t.squeeze(1) for t in (query, key, value))
        heads, width = key.shape[1:]
        shape = ((heads, state.capacity, width), key.dtype)
        kept = state.memory(self, {"key": shape, "value": shape})
        if isinstance(work, Prefill):
            context = attend_prompts(query, key, value, work, scale=1 / math.sqrt(width))
            for name, tensor in (("key", key), ("value", value)):
                rows_RGLD = work.unpack(tensor).transpose(1, 2)
                kept[name][work.rows, :, : rows_RGLD.shape[2]] = rows_RGLD
        else:
            row = torch.arange(len(query), device=query.device)
            for name, tensor in (("key", key), ("value", value)):
                kept[name][row, :, work.positions] = tensor
            context = F.scaled_dot_product_attention(
                query.unsqueeze(2),
                kept["key"][:, :, : work.longest],
                kept["value"][:, :, : work.longest],
                attn_mask=work.seen()[:, None, None],
                enable_gqa=heads != query.shape[1],
            ).squeeze(2)
        return output_of(self.linear_proj, context.flatten(1).unsqueeze(1)), None


def attend_prompts(query: Tensor, key: Tensor, value: Tensor, work: Prefill, *, scale: float):
    """Causal attention of each row to itself; all (T, heads, width), as the result.

    Rows end at different places: what stands after an end is later than all that is real.
    """
    q, k, v = (work.unpack(t).transpose(1, 2) for t in (query, key, value))
    context_RHLD = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return work.pack(context_RHLD.transpose(1, 2))


def _positions(work: object) -> Tensor:
    return work.positions if isinstance(work, Prefill) else work.positions

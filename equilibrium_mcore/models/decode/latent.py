"""Multi-head latent attention while decoding: the normed latent and the turned rope key.

Keys and values of earlier tokens are never made again. The part of the up-projection that makes
keys is applied to the query, and the part that makes values to what the query sums up of latents
(arXiv 2405.04434, section 2.1.2). The up-projection itself stays what it is.

Shapes, of this TP rank: T tokens, R rows, L tokens of the longest, H heads, C latent width, Q width
of a key without position, E of the rope key, V of a value.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from equilibrium_mcore.models.decode.attention import attend_prompts
from equilibrium_mcore.models.decode.state import Decodes, DecodeState, Prefill, Step


class DecodingLatentAttention(Decodes):
    """megatron-core's MLASelfAttention, with decoding of our own."""

    def decode(
        self, hidden_states: Tensor, state: DecodeState, *, rotary_pos_emb: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens / SP, 1, hidden) -> the same shape, and no bias."""
        work = state.work
        query, latent = self._qkv_down_projection(hidden_states)
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        latent, rope = latent.split(widths, dim=-1)
        latent = self.kv_layernorm(latent)  # (tokens / SP, 1, C)
        whole = latent
        if self.config.sequence_parallel:
            whole, rope = (
                gather_from_sequence_parallel_region(t, group=self.tp_group) for t in (latent, rope)
            )
        query_THQ, query_THE = self._queries(query)
        rope_T1E, query_THE = (self._turn(t, state) for t in (rope, query_THE))
        remembered = torch.cat([whole.squeeze(1), rope_T1E.squeeze(1)], dim=-1)
        kept = state.memory(self, {"latent": ((state.capacity, sum(widths)), remembered.dtype)})[
            "latent"
        ]
        if isinstance(work, Prefill):
            rows_RLC = work.unpack(remembered)
            kept[work.rows, : rows_RLC.shape[1]] = rows_RLC
            context = self._prompts(query_THQ, query_THE, latent, rope_T1E, work)
        else:
            kept[torch.arange(len(remembered), device=kept.device), work.positions] = remembered
            context = self._step(query_THQ, query_THE, kept, state)
        return self.linear_proj(context.flatten(1).unsqueeze(1))

    def _queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """From the input or its latent, (tokens / SP, 1, width): without position, and with."""
        if self.config.q_lora_rank is not None:
            query, _ = self.linear_q_up_proj(self.q_layernorm(query))
        else:
            query, _ = self.linear_q_proj(query)
        query = query.squeeze(1).unflatten(-1, (-1, self.q_head_dim))
        return query.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1)

    def _turn(self, x: Tensor, state: DecodeState) -> Tensor:
        """RoPE at the tokens' positions. x: (T, heads, E)."""
        work = state.work
        positions = work.positions if isinstance(work, Prefill) else work.positions
        fixed = state.fixed.setdefault(self.layer_number, {})
        if "angles" not in fixed:  # (capacity, 1, E)
            fixed["angles"] = self.rotary_pos_emb(state.capacity, packed_seq=True).squeeze(1)
        return apply_rotary_pos_emb(
            x,
            fixed["angles"][positions],
            self.config,
            cp_group=self.pg_collection.cp,
            mla_rotary_interleaved=True,
        )

    def _prompts(
        self, query_THQ: Tensor, query_THE: Tensor, latent: Tensor, rope_T1E: Tensor, work: Prefill
    ) -> Tensor:
        """As in training, with keys and values: (T, H, V)."""
        up, _ = self.linear_kv_up_proj(latent)
        widths = [self.config.qk_head_dim, self.config.v_head_dim]
        key, value = up.squeeze(1).unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        rope = rope_T1E.expand(-1, key.shape[1], -1)
        return attend_prompts(
            torch.cat([query_THQ, query_THE], dim=-1),
            torch.cat([key, rope], dim=-1),
            value,
            work,
            scale=self.softmax_scale,
        )

    def _step(
        self, query_THQ: Tensor, query_THE: Tensor, kept: Tensor, state: DecodeState
    ) -> Tensor:
        """Of one token of every row: (R, H, V)."""
        work: Step = state.work
        fixed = state.fixed.setdefault(self.layer_number, {})
        if "key_HQC" not in fixed:
            fixed["key_HQC"], fixed["value_HCV"] = self._absorbed(query_THQ.dtype)
        query_RHC = (query_THQ.transpose(0, 1) @ fixed["key_HQC"]).transpose(0, 1)
        query = torch.cat([query_RHC, query_THE], dim=-1) * self.softmax_scale
        kept = kept[:, : work.longest]
        scores_RHL = query @ kept.transpose(1, 2)
        scores_RHL = scores_RHL.masked_fill(~work.seen().unsqueeze(1), -torch.inf)
        wide = torch.promote_types(scores_RHL.dtype, torch.float32)
        shares_RHL = scores_RHL.softmax(-1, dtype=wide).to(kept.dtype)
        summed_RHC = shares_RHL @ kept[..., : self.config.kv_lora_rank]
        return (summed_RHC.transpose(0, 1) @ fixed["value_HCV"]).transpose(0, 1)

    def _absorbed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The up-projection's parts, (H, Q, C) and (H, C, V). Collective.

        What the layer makes of the unit vectors, so an adapter beside its weight has acted, too.
        """
        latent, config = self.config.kv_lora_rank, self.config
        units = torch.eye(latent, dtype=dtype, device=next(self.parameters()).device)
        if config.sequence_parallel:  # a rank gives its share of positions
            size = self.tp_group.size()
            units = torch.nn.functional.pad(units, (0, 0, 0, -latent % size))
            units = units.chunk(size)[self.tp_group.rank()]
        up, _ = self.linear_kv_up_proj(units.unsqueeze(1))
        widths = [config.qk_head_dim, config.v_head_dim]
        up = up.squeeze(1)[:latent].unflatten(-1, (-1, sum(widths)))
        key_CHQ, value_CHV = up.split(widths, dim=-1)
        return key_CHQ.permute(1, 2, 0).contiguous(), value_CHV.transpose(0, 1).contiguous()

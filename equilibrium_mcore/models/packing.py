"""Packed documents: where each begins, and which of their tokens a context-parallel rank holds.

A packed batch is one long sequence of documents, (1, tokens); attention and Mamba's state begin
again at each. Under context parallelism each document is cut by itself into 2 * CP chunks, and rank
r holds chunks r and 2 * CP - 1 - r of each: the order of Transformer Engine's
`thd_get_partitioned_indices`, here in PyTorch, so that it is the same without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import (
    MambaContextParallel,
    _redo_attention_load_balancing,
    _undo_attention_load_balancing,
)
from torch import Tensor


@dataclass
class PackedDocuments(PackedSeqParams):
    """megatron-core's description of a packed sequence, and how context ranks deal it out.

    Attributes:
        gathered_order: places in the text of the tokens as gathered from CP ranks, (tokens,);
            None for one rank.
        text_order: its inverse.
    """

    gathered_order: Tensor | None = None
    text_order: Tensor | None = None


def packed_documents(
    lengths: Tensor, *, cp_size: int = 1, device: torch.device | None = None
) -> PackedDocuments:
    """The description of documents one after the other, on `device`; lengths: (documents,).

    Sizes depend on the lengths, so a GPU would be waited for at each step of this: it is made
    where the lengths are, and sent afterwards.
    """
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    packed = PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=int(ends[-1]),
    )
    if cp_size > 1:
        ranks = [rank_tokens(lengths, cp_size=cp_size, cp_rank=r) for r in range(cp_size)]
        packed.gathered_order = torch.cat(ranks)
        packed.text_order = packed.gathered_order.argsort()
    for name in ("cu_seqlens_q", "seq_idx", "gathered_order", "text_order"):
        setattr(packed, name, send(getattr(packed, name), device))
    packed.cu_seqlens_kv = packed.cu_seqlens_q
    return packed


def send(tensor: Tensor | None, device: torch.device | None) -> Tensor | None:
    """The tensor on `device`, of which the copy is not waited for; as it is without a device."""
    if tensor is None or device is None or tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def document_lengths(position_ids: Tensor) -> Tensor:
    """Lengths of the documents of a whole batch, in order: each begins where a position is 0.

    position_ids: (batch, sequence), beginning again at every document and every sequence. Raises
    ValueError where a sequence does not begin at 0.
    """
    if position_ids[:, 0].any():
        raise ValueError(
            "a packed sequence whose positions do not begin at 0: the sample does not say where "
            "its documents begin (data.packing: documents needs a dataset made for it)"
        )
    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([flat.numel()]))


def rank_tokens(lengths: Tensor, *, cp_size: int, cp_rank: int) -> Tensor:
    """Places in the packed sequence that a CP rank holds, ascending: (tokens / cp_size,), int64.

    Raises ValueError for a document whose length is no multiple of 2 * cp_size.
    """
    if cp_size == 1:
        return torch.arange(int(lengths.sum()), device=lengths.device)
    chunks = 2 * cp_size
    if (lengths % chunks).any():
        bad = int(lengths[(lengths % chunks).nonzero()[0]])
        raise ValueError(
            f"a packed document of {bad} tokens with parallelism.context={cp_size}: each is cut "
            f"into {chunks} chunks, so set data.document_multiple to a multiple of {chunks}"
        )
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(int(lengths.sum()), device=lengths.device)
    within = place - starts.repeat_interleave(lengths)
    chunk = within // (lengths // chunks).repeat_interleave(lengths)
    return place[(chunk == cp_rank) | (chunk == chunks - 1 - cp_rank)]


def to_text_order(x: Tensor, cp_size: int, packed: PackedDocuments | None) -> Tensor:
    """(sequence, ...) as gathered from CP ranks one after the other -> in the order of the text."""
    if packed is None:
        return _undo_attention_load_balancing(x, cp_size)
    return x.index_select(0, packed.text_order)


def to_rank_order(x: Tensor, cp_size: int, packed: PackedDocuments | None) -> Tensor:
    """The inverse of `to_text_order`."""
    if packed is None:
        return _redo_attention_load_balancing(x, cp_size)
    return x.index_select(0, packed.gathered_order)


class TorchMambaContextParallel(MambaContextParallel):
    """megatron-core's context parallelism of Mamba with packing that needs no Transformer Engine.

    megatron-core orders packed tokens with Transformer Engine's kernel; here its order for a plain
    sequence is taken, and changed to that of the documents.
    """

    def pre_conv_ssm(
        self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """(tokens / CP, batch, channels) -> (tokens, batch, channels / CP), in text order."""
        gathered = super().pre_conv_ssm(input_)
        if self.cp_size == 1 or packed_seq_params is None:
            return gathered
        as_held = to_rank_order(gathered, self.cp_size, None)
        return to_text_order(as_held, self.cp_size, packed_seq_params)

    def post_conv_ssm(
        self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """The way back."""
        if self.cp_size == 1 or packed_seq_params is None:
            return super().post_conv_ssm(input_)
        as_held = to_rank_order(input_, self.cp_size, packed_seq_params)
        return super().post_conv_ssm(to_text_order(as_held, self.cp_size, None))

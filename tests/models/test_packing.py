"""Where packed documents begin, and which of their tokens a context-parallel rank holds."""

from __future__ import annotations

import pytest
import torch
from megatron.core.ssm.mamba_context_parallel import _redo_attention_load_balancing

from equilibrium_mcore.models.packing import (
    document_lengths,
    packed_documents,
    rank_tokens,
    to_rank_order,
    to_text_order,
)


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def test_documents_begin_where_positions_do():
    batch = torch.stack([positions(5, 3, 1), positions(9)])
    assert document_lengths(batch).tolist() == [5, 3, 1, 9]
    with pytest.raises(ValueError, match="do not begin at 0"):
        document_lengths(batch[:, 1:])


def test_packed_documents_tell_each_token_its_document():
    packed = packed_documents(torch.tensor([2, 3]))
    assert packed.cu_seqlens_q.tolist() == [0, 2, 5]
    assert packed.seq_idx.tolist() == [[0, 0, 1, 1, 1]]
    assert packed.max_seqlen_q == 3


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_every_token_is_held_once(cp_size):
    lengths = torch.tensor([8, 16, 40, 24])
    held = [rank_tokens(lengths, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
    assert len({len(mine) for mine in held}) == 1
    assert torch.cat(held).sort().values.tolist() == list(range(88))


@pytest.mark.parametrize("cp_size", [2, 3])
def test_a_single_document_is_cut_as_megatron_cuts_a_sequence(cp_size):
    expected = _redo_attention_load_balancing(torch.arange(24), cp_size).chunk(cp_size)
    for rank in range(cp_size):
        mine = rank_tokens(torch.tensor([24]), cp_size=cp_size, cp_rank=rank)
        assert torch.equal(mine, expected[rank])


def test_each_document_is_cut_by_itself():
    # Chunks of 1 and of 2 tokens: rank 0 holds the first and the last of each document.
    mine = rank_tokens(torch.tensor([4, 8]), cp_size=2, cp_rank=0)
    assert mine.tolist() == [0, 3, 4, 5, 10, 11]


def test_a_document_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="document of 6 tokens.*multiple of 4"):
        rank_tokens(torch.tensor([8, 6]), cp_size=2, cp_rank=0)


@pytest.mark.parametrize("lengths", [None, [8, 16]], ids=["plain", "packed"])
def test_gathered_tokens_go_into_text_order_and_back(lengths):
    packed = packed_documents(torch.tensor(lengths), cp_size=2) if lengths else None
    whole = torch.tensor(lengths or [24])
    held = torch.cat([rank_tokens(whole, cp_size=2, cp_rank=rank) for rank in range(2)])
    text = to_text_order(held.unsqueeze(1), 2, packed)
    assert text.flatten().tolist() == list(range(24))
    assert to_rank_order(text, 2, packed).flatten().tolist() == held.tolist()

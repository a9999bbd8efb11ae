"""The core attention against softmax attention written out, one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from equilibrium_mcore.config.schema import ParallelismConfig, TrainingConfig
from equilibrium_mcore.models.attention import TorchCoreAttention
from equilibrium_mcore.models.transformer_config import build_transformer_config

SEQUENCE, BATCH, HEADS = 11, 2, 4


def naive(query: Tensor, key: Tensor, value: Tensor, scale: float, may_look: Tensor) -> Tensor:
    """(s, b, n, d), (s, b, g, d), (s, b, g, v) -> (s, b, n * v), by loops over heads."""
    heads_per_group = query.shape[2] // key.shape[2]
    outputs = []
    for head in range(query.shape[2]):
        group = head // heads_per_group
        q, k, v = query[:, :, head], key[:, :, group], value[:, :, group]
        scores = torch.einsum("ibd,jbd->bij", q, k) * scale
        weights = scores.masked_fill(~may_look, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("bij,jbv->ibv", weights, v))
    return torch.cat(outputs, dim=-1)


def causal(length: int = SEQUENCE) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def inputs(groups: int, qk_width: int, v_width: int, batch: int = BATCH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((HEADS, qk_width), (groups, qk_width), (groups, v_width))
    return [
        torch.randn(SEQUENCE, batch, *shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    ]


@pytest.fixture
def core(single_rank, small_model):
    training = TrainingConfig(sequence_length=8, global_batch_size=1, steps=1, precision="fp32")

    def make(**settings) -> TorchCoreAttention:
        config = build_transformer_config(
            small_model("*-"), ParallelismConfig(), training, on_gpu=False
        )
        values = dict(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=single_rank,
        )
        return TorchCoreAttention(**values | settings)

    return make


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("qk_width", "v_width"), [(8, 8), (12, 6), (6, 10)])
def test_values_and_gradients_are_softmax_attentions(core, groups, qk_width, v_width):
    module = core(k_channels=qk_width, v_channels=v_width)
    leaves = [t.requires_grad_() for t in inputs(groups, qk_width, v_width)]
    got = module(*leaves)
    expected = naive(*leaves, 1 / math.sqrt(qk_width), causal())
    assert got.shape == (SEQUENCE, BATCH, HEADS * v_width)
    torch.testing.assert_close(got, expected)
    cotangent = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    for one, other in zip(
        torch.autograd.grad(got, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_scale_is_the_one_given_else_of_the_key_width_else_of_the_config(core):
    tensors = inputs(2, 8, 8)
    for settings, scale in (
        ({"softmax_scale": 0.7, "k_channels": 3}, 0.7),
        ({"k_channels": 16}, 0.25),
        ({}, 1 / math.sqrt(8)),  # head_dim of the small model
    ):
        got = core(**settings)(*tensors)
        torch.testing.assert_close(got, naive(*tensors, scale, causal()))


@pytest.mark.parametrize("lengths", [[11], [4, 7], [1, 1, 9], [1] * 11])
@pytest.mark.parametrize("groups", [2, 4])
def test_packed_documents_do_not_look_at_each_other(core, packing, lengths, groups):
    tensors = inputs(groups, 12, 6, batch=1)
    got = core(k_channels=12)(
        *(t.squeeze(1) for t in tensors),  # packed: (tokens, heads, width)
        packed_seq_params=packing(lengths),
    )
    assert got.shape == (SEQUENCE, HEADS * 6)
    scale = 1 / math.sqrt(12)
    for pieces, part in zip(
        zip(*(t.split(lengths) for t in tensors), strict=True), got.split(lengths), strict=True
    ):
        alone = naive(*pieces, scale, causal(len(part)))
        torch.testing.assert_close(part, alone.squeeze(1))


def test_packing_without_documents_is_an_error(core, packing):
    tensors = [t.squeeze(1) for t in inputs(2, 8, 8, batch=1)]
    with pytest.raises(ValueError, match="seq_idx is None: build it with total_tokens"):
        core()(*tensors, packed_seq_params=packing([4, 7], with_documents=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_mask_type": AttnMaskType.no_mask}, "only causal attention"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pg_collection": None}, "process groups are passed"),
    ],
)
def test_what_it_cannot_do_is_refused_when_it_is_built(core, settings, message):
    with pytest.raises(ValueError, match=message):
        core(**settings)


def test_it_reads_its_cp_group_from_the_collection(core, single_rank):
    only_cp = ProcessGroupCollection(cp=single_rank.cp)
    assert core(pg_collection=only_cp).cp_group is single_rank.cp

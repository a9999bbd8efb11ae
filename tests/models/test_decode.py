"""The short cuts of decoding: the very bits of the layers that they stand for."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.models.decode.linear import is_plain
from equilibrium_mcore.models.decode.state import prefill


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_experts_without_gradients_have_the_bits_of_those_with(
    small_model, build, logits_of, activation
):
    model = small_model("ME")
    moe = model.moe.model_copy(update={"activation": activation})
    module = build(model.model_copy(update={"moe": moe}), dtype=torch.float32)
    experts = module.decoder.layers[1].mlp.experts
    assert experts._are_plain()
    ids = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    short = logits_of(module, ids)
    positions = torch.arange(30)[None]
    assert torch.equal(module(ids, positions, None).detach(), short)  # with gradients


def test_a_layer_with_something_beside_it_is_not_plain(small_model, build):
    mixer = build(small_model("M-")).decoder.layers[0].mixer
    assert is_plain(mixer.in_proj) and is_plain(mixer.out_proj)
    mixer.in_proj.register_forward_hook(lambda module, given, output: output)
    assert not is_plain(mixer.in_proj)
    assert not is_plain(mixer.norm)


def test_a_pack_is_unpacked_by_row_and_packed_again():
    work = prefill([3, 1, 2], first=4, tokens=8, device=torch.device("cpu"))
    tokens = torch.arange(10, 18)
    rows = work.unpack(tokens)
    assert rows[work.valid].tolist() == [10, 11, 12, 13, 14, 15]
    assert work.valid.sum(1).tolist() == [3, 1, 2] and work.rows == slice(4, 7)
    assert work.positions[:6].tolist() == [0, 1, 2, 0, 0, 1]
    assert work.pack(rows)[:6].tolist() == tokens[:6].tolist()

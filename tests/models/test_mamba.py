"""The Mamba-2 mixer against transformers' PyTorch implementation, and on packed documents."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.models.mamba import TorchMambaMixer
from equilibrium_mcore.parallel import accelerator

SEQUENCE, BATCH, HIDDEN = 13, 2, 24


def mixer_of(module) -> TorchMambaMixer:
    mixer = module.decoder.layers[0].mixer
    assert type(mixer) is TorchMambaMixer
    return mixer


def hidden(batch: int = BATCH, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(sequence, batch, hidden)"""
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(SEQUENCE, batch, HIDDEN, generator=generator, dtype=torch.float64)
    return values.to(accelerator.device(), dtype)


def transformers_mixer(mixer: TorchMambaMixer) -> torch.nn.Module:
    """transformers' Mamba2Mixer with the weights of `mixer`."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        num_heads=mixer.nheads,
        head_dim=mixer.headdim,
        hidden_size=mixer.d_model,
        state_size=mixer.d_state,
        n_groups=mixer.ngroups,
        expand=mixer.d_inner // mixer.d_model,
        conv_kernel=mixer.d_conv,
        chunk_size=5,  # another than ours
        layer_norm_epsilon=1e-5,
        use_conv_bias=True,
        use_bias=False,
    )
    weights = {
        "conv1d.weight": mixer.conv1d_weight,
        "conv1d.bias": mixer.conv1d_bias,
        "in_proj.weight": mixer.in_proj.weight,
        "out_proj.weight": mixer.out_proj.weight,
        "norm.weight": mixer.norm.weight,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "dt_bias": mixer.dt_bias,
    }
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return theirs.to(accelerator.device())


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_values_and_gradients_are_transformers(small_model, build, groups):
    model = small_model("M")
    mamba = model.mamba.model_copy(update={"num_groups": groups})
    ours = mixer_of(build(model.model_copy(update={"mamba": mamba}), dtype=torch.float32))
    theirs = transformers_mixer(ours)
    x = hidden(dtype=torch.float32).requires_grad_()
    got, bias = ours(x)
    expected = theirs(x.transpose(0, 1)).transpose(0, 1)
    assert bias is None
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.linspace(-1, 1, got.numel(), device=got.device).view_as(got)
    pairs = ((ours.A_log, theirs.A_log), (ours.D, theirs.D), (ours.dt_bias, theirs.dt_bias))
    pairs += ((ours.norm.weight, theirs.norm.weight), (ours.conv1d_bias, theirs.conv1d.bias))
    pairs += ((ours.in_proj.weight, theirs.in_proj.weight), (x, x))
    for one, other in zip(
        torch.autograd.grad(got, [pair[0] for pair in pairs], cotangent),
        torch.autograd.grad(expected, [pair[1] for pair in pairs], cotangent),
        strict=True,
    ):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("lengths", [[5, 8], [4, 4, 5], [1, 1, 1, 10]])
def test_packed_documents_are_as_if_alone(small_model, build, packing, lengths):
    mixer = mixer_of(build(small_model("M")))
    x = hidden(batch=1)
    packed, _ = mixer(x, packed_seq_params=packing(lengths))
    alone = torch.cat([mixer(part)[0] for part in x.split(lengths)])
    torch.testing.assert_close(packed, alone)
    assert not torch.allclose(packed, mixer(x)[0])


def test_packing_without_documents_is_an_error(small_model, build, packing):
    mixer = mixer_of(build(small_model("M")))
    with pytest.raises(ValueError, match="state would leak .* total_tokens"):
        mixer(hidden(batch=1), packed_seq_params=packing([5, 8], with_documents=False))


def test_it_is_built_without_mamba_ssm_and_leaves_megatron_as_it_was(small_model, build):
    from megatron.core.ssm import mamba_mixer

    before = mamba_mixer.HAVE_MAMBA_SSM, mamba_mixer.ExtendedRMSNorm
    build(small_model("M"))
    assert (mamba_mixer.HAVE_MAMBA_SSM, mamba_mixer.ExtendedRMSNorm) == before


def test_its_widths_are_the_models(small_model, build):
    model = small_model("M")
    mamba = model.mamba.model_copy(update={"conv_width": 3, "chunk_size": 7})
    mixer = mixer_of(build(model.model_copy(update={"mamba": mamba})))
    inner, channels = 6 * 8, 6 * 8 + 2 * 2 * 5
    assert mixer.chunk_size == 7
    assert mixer.conv1d_weight.shape == (channels, 1, 3)
    assert mixer.in_proj.weight.shape == (inner + channels + 6, HIDDEN)
    # The gated norm is over B and C's groups, whatever the layout.
    assert mixer.norm.group_size == inner // 2

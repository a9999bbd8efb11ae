"""Every layer kind is built from real modules, and no token learns of a later one."""

from __future__ import annotations

import pytest
import torch
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from equilibrium_mcore.models import provider
from equilibrium_mcore.models.attention import TorchCoreAttention
from equilibrium_mcore.models.decode.attention import DecodingSelfAttention
from equilibrium_mcore.models.mamba import TorchMambaMixer
from equilibrium_mcore.models.norms import RMSNorm
from equilibrium_mcore.models.specs import TORCH, MultiLatentSelfAttention

LENGTH, CHANGED = 13, 6
# A changed token may go to another expert, and how a product of matrices rounds a row may depend on
# how many rows the expert has. In float64 that is 1e-15 of logits of about 1; all else is exact.
ROUNDING_OF_EXPERTS = 1e-12
PLACES = {  # letter: (where its work is done, of which class)
    "M": ("mixer", TorchMambaMixer),
    "*": ("self_attention", DecodingSelfAttention),
    "+": ("self_attention", MultiLatentSelfAttention),
    "-": ("mlp", MLP),
    "E": ("mlp", MoELayer),
}


UNUSED = {  # by pattern: sections without a layer, which would change what the layers do
    "M*-": {"mla": "+", "moe": "E"},
    "M+E": {"attention": "*", "mlp": "-"},
    "ME": {"attention": "*", "mla": "+"},
}


def tokens(seed: int = 7) -> torch.Tensor:
    return torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def changed(ids: torch.Tensor) -> torch.Tensor:
    """The same with another token at CHANGED in the first sequence."""
    other = ids.clone()
    other[0, CHANGED] = (ids[0, CHANGED] + 1) % 50
    return other


# -------------------------------------------------------------------------- what stands where


@pytest.mark.parametrize("pattern", UNUSED)
def test_a_section_without_a_layer_changes_nothing(small_model, build, logits_of, pattern):
    """Not the activation of channel mixers, nor RoPE, which are one for all of megatron-core's."""
    model = small_model(pattern)
    more = {kind: getattr(small_model(letter), kind) for kind, letter in UNUSED[pattern].items()}
    for kind in more.keys() & {"mlp", "moe"}:
        more[kind] = more[kind].model_copy(update={"activation": "gelu"})
    module, beside = build(model), build(model.model_copy(update=more))
    beside.load_state_dict(module.state_dict())
    apart = logits_of(module, tokens()) - logits_of(beside, tokens())
    assert apart.abs().max() == 0


@pytest.mark.parametrize("pattern", ["M", "*", "+", "-", "E", "ME|+E", "M-*-", "+-|+E"])
def test_each_letter_builds_its_layer(small_model, build, pattern):
    module = build(small_model(pattern))
    letters = pattern.replace("|", "")
    assert len(module.decoder.layers) == len(letters)
    for letter, layer in zip(letters, module.decoder.layers, strict=True):
        place, kind = PLACES[letter]
        assert type(getattr(layer, place)) is kind
        assert isinstance(layer, MLPLayer) == (letter == "-")
        if letter in "*+":
            assert type(layer.self_attention.core_attention) is TorchCoreAttention
        norm = {"M": "norm", "*": "input_layernorm", "+": "input_layernorm"}.get(letter)
        assert type(getattr(layer, norm or "pre_mlp_layernorm")) is RMSNorm
    assert type(module.decoder.final_norm) is RMSNorm


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_norms_have_the_models_epsilon(small_model, build, epsilon):
    module = build(small_model("M-|+E", norm_epsilon=epsilon))
    norms = [m for m in module.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 4 + 1 + 2  # of the layers, the last, and of MLA's two latents
    assert {norm.eps for norm in norms} == {epsilon}


def test_mla_with_a_query_latent_has_both_latent_norms(small_model, build):
    attention = build(small_model("+")).decoder.layers[0].self_attention
    assert attention.linear_q_down_proj.weight.shape == (12, 24)
    assert attention.linear_q_up_proj.weight.shape == (4 * (8 + 4), 12)
    assert type(attention.q_layernorm) is type(attention.kv_layernorm) is RMSNorm
    assert attention.q_layernorm.weight.shape == (12,)
    assert attention.kv_layernorm.weight.shape == (16,)


def test_mla_without_a_query_latent_still_has_the_key_values_norm(small_model, build):
    mla = small_model("+").mla.model_copy(update={"q_lora_rank": None})
    attention = build(small_model("+", mla=mla)).decoder.layers[0].self_attention
    assert type(attention.linear_q_proj) is ColumnParallelLinear
    assert attention.linear_q_proj.weight.shape == (4 * (8 + 4), 24)
    assert type(attention.kv_layernorm) is RMSNorm
    assert getattr(attention, "q_layernorm", None) is None
    assert not any("q_layernorm" in name for name, _ in attention.named_parameters())


def test_latent_norms_act(small_model, build, logits_of):
    module = build(small_model("+"))
    before = logits_of(module, tokens())
    for name in ("q_layernorm", "kv_layernorm"):
        norm = getattr(module.decoder.layers[0].self_attention, name)
        assert not isinstance(norm, IdentityOp)
        plain = norm.weight.data.clone()
        norm.weight.data *= 1.5
        assert not torch.allclose(logits_of(module, tokens()), before)
        norm.weight.data = plain


def test_tied_embeddings_are_one_table(small_model, build):
    tied = dict(build(small_model("M-", tie_embeddings=True)).named_parameters())
    untied = dict(build(small_model("M-", tie_embeddings=False)).named_parameters())
    assert set(untied) - set(tied) == {"output_layer.weight"}


def test_biases_are_qwens_only(small_model, build):
    attention = small_model("*-").attention.model_copy(update={"qkv_bias": True})
    biased = build(small_model("*-", attention=attention))
    biases = [name for name, _ in biased.named_parameters() if name.endswith("bias")]
    assert biases == ["decoder.layers.0.self_attention.linear_qkv.bias"]
    plain = build(small_model("*-"))
    assert not any(name.endswith("bias") for name, _ in plain.named_parameters())


@pytest.mark.parametrize(("activation", "rows"), [("swiglu", 80), ("relu2", 40), ("gelu", 40)])
def test_a_gated_mlp_has_two_halves(small_model, build, activation, rows):
    mlp = small_model("-").mlp.model_copy(update={"activation": activation})
    layer = build(small_model("-", mlp=mlp)).decoder.layers[0]
    assert layer.mlp.linear_fc1.weight.shape == (rows, 24)


def test_small_ssm_parameters_stay_float32_in_bf16(small_model, build):
    module = build(small_model("ME"), dtype=torch.bfloat16, precision="bf16")
    dtypes = {name.rsplit(".", 1)[-1]: p.dtype for name, p in module.named_parameters()}
    assert {dtypes.pop(name) for name in ("A_log", "dt_bias", "D")} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}


def test_the_backend_is_torchs_where_no_gpu_is():
    assert provider.choose_backend("auto", on_gpu=False) is TORCH
    assert provider.choose_backend("torch", on_gpu=True) is TORCH
    with pytest.raises(ValueError, match="training.backend=transformer_engine needs a CUDA"):
        provider.choose_backend("transformer_engine", on_gpu=False)


# ---------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("mixer", ["M", "*", "+"])
def test_a_later_token_changes_no_earlier_logit(small_model, build, logits_of, mixer):
    module = build(small_model(mixer))
    before = logits_of(module, tokens())
    after = logits_of(module, changed(tokens()))
    assert torch.equal(after[:, :CHANGED], before[:, :CHANGED])
    assert torch.equal(after[1], before[1])  # the other sequence of the batch
    difference = (after - before)[0].abs().amax(-1)
    assert (difference[CHANGED:] > 1e-6).all()  # and every later token sees it


@pytest.mark.parametrize("channel_mixer", ["-", "E"])
def test_a_channel_mixer_works_on_each_token_alone(small_model, build, logits_of, channel_mixer):
    module = build(small_model(channel_mixer))
    before = logits_of(module, tokens())
    after = logits_of(module, changed(tokens()))
    difference = (after - before).abs().amax(-1)
    assert difference[0, CHANGED] > 1e-3
    difference[0, CHANGED] = 0
    assert difference.max() <= (ROUNDING_OF_EXPERTS if channel_mixer == "E" else 0)


@pytest.mark.parametrize("pattern", ["ME|+E", "M-*E"])
def test_a_whole_hybrid_is_causal(small_model, build, logits_of, pattern):
    module = build(small_model(pattern))
    before = logits_of(module, tokens())
    after = logits_of(module, changed(tokens()))
    difference = (after - before)[0].abs().amax(-1)
    assert difference[:CHANGED].max() <= ROUNDING_OF_EXPERTS
    assert (difference[CHANGED:] > 1e-6).all()


@pytest.mark.parametrize("pattern", ["M-", "*-", "+-", "ME|+E"])
def test_packed_documents_are_as_if_alone(small_model, build, logits_of, packing, pattern):
    """Positions count from each document's start, and nothing passes between documents."""
    module = build(small_model(pattern))
    ids, lengths = tokens()[:1], [4, 1, 8]
    packed = logits_of(module, ids, packing(lengths))
    alone = torch.cat([logits_of(module, part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert (logits_of(module, ids) - packed).abs().max() > 1e-2

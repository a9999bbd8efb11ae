"""Each CUDA layer against its PyTorch reference in float32, on one device, with equal weights."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.parallel import accelerator, process_groups

pytestmark = pytest.mark.gpu

# Relative errors. bfloat16 has 8 bits: one rounding is up to 0.4%, and a chain of products and sums
# stays near 1%. Transformer Engine and Triton multiply float32 in tf32 (11 bits), near 0.03% per
# product; PyTorch's reference does not.
TOLERANCE = {"bf16": 2e-2, "fp32": 3e-3}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def model(rehearsal):
    """The 3B model's widths, or the tiny model's in a rehearsal."""
    return load_model("equilibrium_tiny" if rehearsal else "equilibrium_3b")


@pytest.fixture(autouse=True)
def seeded(groups):
    process_groups.seed_everything(0)


def random(*shape: int, precision: str) -> torch.Tensor:
    return torch.randn(*shape, device=accelerator.device()).to(DTYPES[precision])


def pair(model, precision: str):
    """(fast backend, its config), (reference backend, its float32 config)."""
    from equilibrium_mcore.models.specs import TORCH
    from tests.gpu.compare import fast_backend, transformer_config

    fast = fast_backend()
    return (
        (fast, transformer_config(model, precision, fast)),
        (TORCH, transformer_config(model, "fp32", TORCH)),
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["column", "row", "duplicated"])
def test_linear(kind, precision, model, groups):
    from equilibrium_mcore.certify.kernels import give_weights
    from equilibrium_mcore.models.specs import TORCH
    from tests.gpu.compare import assert_equal_function

    def build(backend, config):
        sizes = {"column": (config.hidden_size, 784), "row": (768, config.hidden_size)}
        arguments = dict(
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=kind == "row",
            is_expert=False,
            tp_group=groups.tp,
        )
        if kind == "row":
            arguments["input_is_parallel"] = True
        elif kind == "column" or backend is TORCH:
            arguments["gather_output"] = False
        else:  # as MLASelfAttention builds Transformer Engine's
            arguments |= dict(
                parallel_mode="duplicated", skip_weight_param_allocation=False, tp_group=None
            )
        module = getattr(backend, f"{kind}_linear")(
            *sizes.get(kind, (config.hidden_size, 576)), **arguments
        )
        return module.to(accelerator.device())

    fast, reference = (build(*side) for side in pair(model, precision))
    give_weights(fast, reference)
    width = 768 if kind == "row" else model.hidden_size
    inputs = [random(256, 2, width, precision=precision)]
    assert_equal_function(fast, reference, inputs, tolerance=TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_norm(precision, model, groups):
    from equilibrium_mcore.certify.kernels import give_weights
    from tests.gpu.compare import assert_equal_function

    fast, reference = (
        backend.norm(config=config, hidden_size=model.hidden_size, eps=1e-5).to(
            accelerator.device()
        )
        for backend, config in pair(model, precision)
    )
    with torch.no_grad():
        fast.weight.normal_()
    give_weights(fast, reference)
    inputs = [random(256, 2, model.hidden_size, precision=precision)]
    assert_equal_function(fast, reference, inputs, tolerance=TOLERANCE[precision])


@pytest.mark.parametrize("length", [1024, 4096])
def test_attention_at_the_widths_of_mla(length, model, groups, rehearsal):
    """Query and key 192 wide, value 128, 16 heads; causal."""
    from megatron.core.transformer.enums import AttnMaskType

    from tests.gpu.compare import assert_equal_function

    length = length // 16 if rehearsal else length
    mla = model.mla
    qk_width = mla.qk_nope_head_dim + mla.qk_rope_head_dim

    def build(backend, config):
        return backend.core_attention(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=qk_width**-0.5,
            k_channels=qk_width,
            v_channels=mla.v_head_dim,
            pg_collection=groups,
        )

    def call(module, tensors):
        return module(*tensors, None, attn_mask_type=AttnMaskType.causal)

    fast, reference = (build(*side) for side in pair(model, "bf16"))
    inputs = [
        random(length, 1, mla.num_heads, width, precision="bf16")
        for width in (qk_width, qk_width, mla.v_head_dim)
    ]
    assert_equal_function(fast, reference, inputs, tolerance=TOLERANCE["bf16"], call=call)


# The scan's gradients of A_log and dt_bias are sums over all tokens of terms that cancel, so their
# relative error is several times that of the output.
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 6e-2), ("fp32", 1e-2)])
def test_mamba_mixer(precision, tolerance, model, groups, rehearsal):
    """The fused Triton scan and convolution; the projections are PyTorch's on both sides."""
    from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules

    from equilibrium_mcore.certify.kernels import give_weights
    from equilibrium_mcore.models.provider import cast_parameters
    from equilibrium_mcore.models.specs import TORCH
    from tests.gpu.compare import assert_equal_function

    def build(backend, config):
        module = backend.mamba_mixer(
            config,
            MambaMixerSubmodules(in_proj=TORCH.column_linear, out_proj=TORCH.row_linear),
            model.hidden_size,
            d_conv=model.mamba.conv_width,
            chunk_size=model.mamba.chunk_size,
            layer_number=1,
            pg_collection=groups,
        ).to(accelerator.device())
        # Parameters are told by their names inside a layer.
        cast_parameters(torch.nn.ModuleDict({"mixer": module}), config.params_dtype)
        return module

    fast, reference = (build(*side) for side in pair(model, precision))
    if not rehearsal:
        assert type(fast) is not type(reference), "mamba-ssm's mixer was not taken"
    assert all(getattr(fast, name).dtype == torch.float32 for name in ("A_log", "dt_bias", "D"))
    give_weights(fast, reference)
    length = 96 if rehearsal else 1024
    inputs = [random(length, 2, model.hidden_size, precision=precision)]
    assert_equal_function(fast, reference, inputs, tolerance=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_grouped_experts(precision, model, groups):
    """All experts in one grouped product, against one after the other; one expert has no token."""
    from equilibrium_mcore.certify.kernels import give_weights
    from tests.gpu.compare import assert_equal_function

    experts = model.moe.num_experts

    def build(backend, config):
        make = backend.experts.grouped_mlp_modules(backend.grouped_experts)
        return make(experts, config, pg_collection=groups).to(accelerator.device())

    fast, reference = (build(*side) for side in pair(model, precision))
    give_weights(fast, reference)
    counts = torch.arange(experts) * 3  # uneven, and none for the first
    tokens = int(counts.sum())

    def call(module, tensors):
        hidden, scores = tensors
        return module(hidden, counts, scores.float())[0]

    inputs = [
        random(tokens, model.hidden_size, precision=precision),
        torch.rand(tokens, device=accelerator.device()).to(DTYPES[precision]),
    ]
    # The expert without tokens must have a gradient of exactly zero on both sides.
    assert_equal_function(fast, reference, inputs, tolerance=TOLERANCE[precision], call=call)

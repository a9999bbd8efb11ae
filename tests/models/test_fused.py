"""What faster kernels compute is what the plain ones do; and which layers are given them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from equilibrium_mcore.config.fused import FusedConfig
from equilibrium_mcore.config.schema import ParallelismConfig, TrainingConfig
from equilibrium_mcore.models.provider import accumulate_weight_gradients, build_model
from equilibrium_mcore.models.transformer_config import build_transformer_config

# Of values near 1 in float64: other orders of the same products. Routers compute in float32.
MOST, MOST_OF_EXPERTS = 1e-12, 1e-6


def losses_and_gradients(module: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses per token of fixed tokens, and the gradients of their weighted sum by parameter."""
    tokens = torch.arange(32).reshape(2, 16) % 50
    positions = torch.arange(16).expand(2, -1)
    losses = module.train()(tokens, positions, None, labels=tokens.roll(-1, 1))
    losses.mul(torch.linspace(0.5, 1.5, losses.numel()).view_as(losses)).sum().backward()
    return losses.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def both(build, model, *, fused: FusedConfig, **changes) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of the plain model, and of one with the same weights and `fused`."""
    plain, other = build(model, **changes), build(model, fused=fused, **changes)
    other.load_state_dict(plain.state_dict())
    return [losses_and_gradients(module) for module in (plain, other)]


@pytest.mark.parametrize("pattern", ["M-+-", "ME+E"])
def test_fused_swiglu(small_model, build, pattern):
    (losses, gradients), (again, more) = both(
        build, small_model(pattern), fused=FusedConfig(activation=True)
    )
    most = MOST_OF_EXPERTS if "E" in pattern else MOST
    assert (losses - again).abs().max() <= most
    assert gradients.keys() == more.keys()
    for name, gradient in gradients.items():
        assert (gradient - more[name]).abs().max() <= most * gradient.abs().max(), name


def test_fused_swiglu_is_taken(small_model, build, monkeypatch):
    """By experts, with the router's probability, and by the shared expert, without."""
    from megatron.core.transformer import mlp

    called = []
    for name in ("bias_swiglu_impl", "weighted_bias_swiglu_impl"):
        plain = getattr(mlp, name)
        monkeypatch.setattr(
            mlp, name, lambda *a, plain=plain, name=name: (called.append(name), plain(*a))[1]
        )
    losses_and_gradients(build(small_model("E"), fused=FusedConfig(activation=True)))
    assert set(called) == {"bias_swiglu_impl", "weighted_bias_swiglu_impl"}


def test_fused_cross_entropy_in_bf16(small_model, build):
    """The same sums, and gradients rounded to bf16 where those of bf16 logits are anyway."""
    (losses, gradients), (again, more) = both(
        build,
        small_model("M-+-"),
        fused=FusedConfig(cross_entropy=True),
        dtype=torch.bfloat16,
        precision="bf16",
    )
    assert torch.equal(losses, again)
    assert all(torch.equal(more[name], gradient) for name, gradient in gradients.items())


def test_weight_gradients_are_accumulated_by_the_engines_layers_alone(small_model, single_rank):
    """A flag of each of its layers; megatron-core's own, as the output layer, stay without."""
    engine = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)])
    engine[0].fuse_wgrad_accumulation = False  # as on Transformer Engine's linear layers
    accumulate_weight_gradients(engine)
    assert engine[0].fuse_wgrad_accumulation
    assert not hasattr(engine[1], "fuse_wgrad_accumulation")
    training = TrainingConfig(
        sequence_length=16,
        global_batch_size=1,
        steps=1,
        backend="torch",
        fused=FusedConfig(weight_gradients=True),
    )
    module = build_model(small_model("M-E"), ParallelismConfig(), training, single_rank)
    flags = [part.gradient_accumulation_fusion for part in module.modules() if has_flag(part)]
    assert flags and not any(flags)  # without apex megatron-core refuses to build one with it


def has_flag(part: torch.nn.Module) -> bool:
    return hasattr(part, "gradient_accumulation_fusion")


GIVEN = [
    ({"fused": {"permutation": True}}, {}, {"moe_permute_fusion": True}),
    ({"fused": {"router": True}}, {}, {"moe_router_fusion": True}),
    ({}, {"overlap_shared_experts": True}, {"moe_shared_expert_overlap": True}),
    (
        {},
        {"moe_dispatcher": "deepep", "expert": 2},
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
    ),
    (
        {},
        {"moe_dispatcher": "hybridep", "expert": 2},
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
    ),
    ({}, {"context": 2, "context_exchange": "all_gather"}, {"cp_comm_type": "all_gather"}),
    ({"cuda_graphs": ["mamba", "attn"]}, {}, {"cuda_graph_impl": "local"}),
    ({}, {}, {"cuda_graph_impl": "none", "moe_permute_fusion": False, "cp_comm_type": None}),
]


@pytest.mark.parametrize(("training", "layout", "given"), GIVEN)
def test_megatrons_config_is_given_the_setting(small_model, monkeypatch, training, layout, given):
    """Its own checks of them pass, too; of the permutation, where Transformer Engine is."""
    from megatron.core.transformer.moe import moe_utils

    for name in [name for name in vars(moe_utils) if name.startswith("fused_")]:
        monkeypatch.setattr(moe_utils, name, SimpleNamespace())
    config = build_transformer_config(
        small_model("ME+E"),
        ParallelismConfig(**layout),
        TrainingConfig(sequence_length=16, global_batch_size=1, steps=1, **training),
        on_gpu=False,
    )
    assert {name: getattr(config, name) for name in given} == given

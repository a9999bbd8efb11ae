"""Every module that `training.recompute_modules` takes is built, recomputed, and gives the same."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from equilibrium_mcore.config.schema import ParallelismConfig, TrainingConfig
from equilibrium_mcore.models import transformer_config
from equilibrium_mcore.models.specs import TORCH

SELECTIVE = get_args(get_args(TrainingConfig.model_fields["recompute_modules"].annotation)[0])
ENGINE_ONLY = {"moe_act"}  # of Transformer Engine's grouped experts
PATTERNS = {"mlp": "M-+-"}  # that have the module; by default one with all else


def pass_through(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a weighted sum of the logits by parameter, and how many modules were called."""
    calls = []
    hook = register_module_forward_hook(lambda *_: calls.append(1))
    tokens = torch.arange(16).reshape(2, 8)
    try:
        logits = module.train()(tokens, torch.arange(8).expand(2, -1), None)
        logits.mul(torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    finally:
        hook.remove()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return gradients, len(calls)


@pytest.mark.parametrize("module", [name for name in SELECTIVE if name not in ENGINE_ONLY])
def test_recomputing_a_module_changes_no_gradient(small_model, build, module):
    model = small_model(PATTERNS.get(module, "ME+E"))
    kept = build(model)
    recomputed = build(model, recompute="selective", recompute_modules=[module])
    recomputed.load_state_dict(kept.state_dict())
    (plain, calls), (again, more_calls) = pass_through(kept), pass_through(recomputed)
    assert again.keys() == plain.keys() and len(plain) > 5
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert more_calls > calls  # something was computed twice


@pytest.mark.parametrize("module", SELECTIVE)
def test_megatrons_config_takes_every_module_on_the_engines_modules(
    small_model, monkeypatch, module
):
    """megatron-core checks `moe_act` against grouped experts while its config is built."""
    engine = replace(TORCH, name="transformer_engine", grouped_experts=True)
    monkeypatch.setattr(transformer_config, "choose_backend", lambda name, on_gpu: engine)
    training = TrainingConfig(
        sequence_length=8,
        global_batch_size=1,
        steps=1,
        recompute="selective",
        recompute_modules=[module],
    )
    config = transformer_config.build_transformer_config(
        small_model("M-+E"), ParallelismConfig(), training, on_gpu=False
    )
    assert config.recompute_modules == [module]
    assert config.moe_grouped_gemm and config.transformer_impl == "transformer_engine"

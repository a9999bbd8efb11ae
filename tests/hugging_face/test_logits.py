"""The exported model computes what Megatron computes, and planted faults are noticed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hugging_face.conftest import MODELS

TOLERANCE = 1e-4


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, **settings
    ).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_megatron(name, saved, exported):
    case = saved(name)
    found = logits_of(load(exported(name)), case.ids)
    assert case.logits.std() > 0.5, "the test's weights are too small to show a fault"
    torch.testing.assert_close(found, case.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_cache_equals_without(name, saved, exported):
    model = load(exported(name))
    prompt = saved(name).ids[:, :11]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **settings))
    # Token by token through the cache, the logits are those of one pass.
    with torch.no_grad():
        outputs = model(prompt[:, :5], use_cache=True)
        steps = [outputs.logits]
        for token in range(5, prompt.shape[1]):
            outputs = model(
                prompt[:, token : token + 1],
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
            steps.append(outputs.logits)
    torch.testing.assert_close(
        torch.cat(steps, dim=1), logits_of(model, prompt), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ["hybrid", "deepseek", "nemotron", "mamba2"])
def test_left_padding_changes_nothing(name, saved, exported):
    model = load(exported(name))
    long = saved(name).ids[:1, :11]
    short = saved(name).ids[1:, :6]
    padding = torch.full((1, 5), model.config.pad_token_id)
    batch = torch.cat([long, torch.cat([padding, short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(together[:1], model.generate(long, **settings))
    assert torch.equal(together[1:, 5:], model.generate(short, **settings))


def of_kind(model, attribute):
    return [module for module in model.modules() if hasattr(module, attribute)]


def rope_not_interleaved(model):
    for module in of_kind(model, "kv_a_layernorm"):
        module.config.rope_interleave = False


def no_latent_norm(model):
    for module in of_kind(model, "kv_a_layernorm"):
        module.kv_a_layernorm.weight.data.fill_(1)


def latent_epsilon_of_deepseek(model):
    for module in of_kind(model, "kv_a_layernorm"):
        module.kv_a_layernorm.variance_epsilon = 1e-6


def layer_epsilon(model):
    for block in model.model.layers:
        block.norm.variance_epsilon = 1e-5


def no_routed_scaling(model):
    for module in of_kind(model, "routed_scaling_factor"):
        module.routed_scaling_factor = 1.0


def other_top_k_norm(model):
    for module in of_kind(model, "norm_topk_prob"):
        if isinstance(module, torch.nn.Module) and hasattr(module, "routed_scaling_factor"):
            module.norm_topk_prob = not module.norm_topk_prob


def no_expert_bias(model):
    for module in of_kind(model, "e_score_correction_bias"):
        module.e_score_correction_bias.zero_()


def swapped_z_and_x(model):
    for module in of_kind(model, "in_proj"):
        z, x, rest = module.in_proj.weight.data.split(
            [
                module.intermediate_size,
                module.intermediate_size,
                module.conv_dim - module.intermediate_size + module.num_heads,
            ]
        )
        module.in_proj.weight.data = torch.cat([x, z, rest])


def mamba_epsilon_of_the_model(model):
    for module in of_kind(model, "in_proj"):
        module.norm.variance_epsilon = model.config.layer_norm_epsilon


def clamped_time_step(model):
    for module in of_kind(model, "in_proj"):
        module.time_step_limit = (0.1, float("inf"))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("hybrid", rope_not_interleaved),
        ("hybrid", no_latent_norm),
        ("hybrid", latent_epsilon_of_deepseek),
        ("hybrid", layer_epsilon),
        ("hybrid", no_routed_scaling),
        ("hybrid", other_top_k_norm),
        ("hybrid", swapped_z_and_x),
        ("hybrid", mamba_epsilon_of_the_model),
        ("hybrid", clamped_time_step),
        ("deepseek", rope_not_interleaved),
        ("deepseek", no_routed_scaling),
        ("deepseek", other_top_k_norm),
        ("deepseek", no_expert_bias),
        ("nemotron", other_top_k_norm),
    ],
)
def test_planted_faults_are_noticed(name, fault, saved, exported):
    """Negative controls: each fault moves the logits far beyond the tolerance."""
    model = load(exported(name))
    with torch.no_grad():
        fault(model)
    difference = (logits_of(model, saved(name).ids) - saved(name).logits).abs().max().item()
    assert difference > 100 * TOLERANCE

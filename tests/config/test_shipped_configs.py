"""The files in configs/ are valid, models have the published sizes, the document is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibrium_mcore.config import describe
from equilibrium_mcore.config.layout import micro_batches_per_step, resolve_world_size
from equilibrium_mcore.config.load import load_model, load_run
from equilibrium_mcore.config.pattern import count_kinds
from equilibrium_mcore.config.rules import check
from equilibrium_mcore.config.schema import ModelConfig

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "configs/runs"
MODELS = sorted(path.stem for path in (ROOT / "configs/models").glob("*.yaml"))

# From the publishers' safetensors metadata; mamba2 from the reference code's shapes. The two
# equilibrium models are this project's: the figures that their files state.
PARAMETERS = {
    "deepseek_v2_lite_16b": 15_706_484_224,
    "equilibrium_3b": 2_933_952_720,
    "equilibrium_tiny": 3_004_048,
    "llama_1b": 1_235_814_400,
    "llama_3b": 3_212_749_824,
    "llama_7b": 6_738_415_616,
    "mamba2_1.3b": 1_343_757_312,
    "mamba2_130m": 128_989_632,
    "qwen2_1.5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
}


def parameters_by_hand(model: ModelConfig) -> int:
    """All parameters of a model, from the papers' shapes; every layer has one norm of its own."""
    h, total = model.hidden_size, model.hidden_size  # the final norm
    total += model.padded_vocab_size * h * (1 if model.tie_embeddings else 2)
    layers = count_kinds(model.layer_pattern)
    total += h * sum(layers.values())
    gate = {"swiglu": 3}
    if count := layers.get("mamba", 0):
        m = model.mamba
        inner = m.num_heads * m.head_dim
        channels = inner + 2 * m.num_groups * m.state_dim
        projections = h * (inner + channels + m.num_heads) + inner * h
        # Convolution and its bias; A_log, D and dt_bias; the gated norm.
        total += count * (projections + channels * (m.conv_width + 1) + 3 * m.num_heads + inner)
    if count := layers.get("attention", 0):
        a = model.attention
        wide = (a.num_heads + 2 * a.num_query_groups) * a.head_dim
        total += count * (h * wide + wide * a.qkv_bias + a.num_heads * a.head_dim * h)
    if count := layers.get("mla", 0):
        a = model.mla
        query = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        q, c = a.q_lora_rank, a.kv_lora_rank
        total += count * (h * query if q is None else h * q + q + q * query)
        total += count * (h * (c + a.qk_rope_head_dim) + c)
        total += count * (c * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim))
        total += count * (a.num_heads * a.v_head_dim * h)
    if count := layers.get("mlp", 0):
        total += count * gate.get(model.mlp.activation, 2) * h * model.mlp.ffn_hidden_size
    if count := layers.get("moe", 0):
        e = model.moe
        width = e.num_experts * e.expert_ffn_hidden_size + e.shared_ffn_hidden_size
        total += count * (gate.get(e.activation, 2) * h * width + h * e.num_experts)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_model_has_its_published_size(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert parameters_by_hand(model) == PARAMETERS[name]
    text = (ROOT / "configs/models" / f"{name}.yaml").read_text()
    head = text.split("\nname:")[0]
    assert text.startswith("#") and f"{PARAMETERS[name]:,}" in head


def test_layouts_that_the_tiny_model_is_for(build) -> None:
    layouts = [
        {"tensor": 2, "sequence": True},
        {"tensor": 4, "sequence": True, "context": 2},
        {"pipeline": 2},
        {"pipeline": 4},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        {"context": 4},
        *({"expert": n} for n in (2, 4, 8)),
        {"expert_tensor": 2},
        {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2, "expert": 2},
        {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
    ]
    for layout in layouts:
        build({"parallelism": layout, "training.global_batch_size": 8})


def test_stages_that_the_3b_model_is_for(build) -> None:
    for pipeline in (1, 2, 3, 4, 6, 8, 12, 24):
        build({"model": "equilibrium_3b", "parallelism.pipeline": pipeline})


def test_quickstart_is_tensor_sequence_and_expert_parallel_on_4_ranks() -> None:
    config = load_run(ROOT / "configs/runs/quickstart.yaml")
    p = config.parallelism
    assert (p.tensor, p.sequence, p.expert, resolve_world_size(p)) == (2, True, 2, 4)
    assert config.training.precision in ("fp32", "bf16")


@pytest.mark.parametrize("world_size", [None, 8, 64, 512])
def test_pretrain_3b_scales(world_size: int | None) -> None:
    path = ROOT / "configs/runs/pretrain_3b.yaml"
    config = load_run(path, world_size=world_size)
    assert check(config, world_size=world_size) == []
    at_once = config.training.micro_batch_size * (world_size or 8)
    assert micro_batches_per_step(config, world_size) * at_once == 1024


def test_document_is_up_to_date() -> None:
    document = describe.DOCUMENT.read_text(encoding="utf-8")
    assert describe.up_to_date(document) == document, (
        "docs/reference/configuration.md differs from the schema: run "
        "`python -m equilibrium_mcore.config.describe`"
    )


def test_document_has_every_section_with_types_and_defaults() -> None:
    text = describe.describe()
    assert "### `optimizer.schedule`" in text and "### `data.sources.0`" in text
    assert "| `decay_form` | `linear`, `cosine`, `sqrt` | linear |" in text
    assert "| `steps` | integer > 0 or null | null |" in text
    assert "| `beta1` | number >= 0, <= 1 | 0.9 |" in text
    with pytest.raises(ValueError, match="must hold the lines"):
        describe.up_to_date("no markers")


SHIPPED = [p for p in sorted(RUNS.rglob("*.yaml")) if p.name != "model.yaml"]


@pytest.mark.parametrize("name", [str(path.relative_to(RUNS)) for path in SHIPPED])
def test_every_shipped_run_can_be_checked(name):
    assert check(load_run(RUNS / name)) == []


def test_the_stages_of_the_examples():
    """What `configs/runs` has in miniature, beside pretraining."""
    stages = {load_run(path).stage for path in RUNS.glob("*.yaml")}
    assert {"pretrain", "sft", "lora", "distill", "dpo", "reward_model"} <= stages

"""Exact parameter counts: against published totals, by hand, and against transformers."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import random as mcore_random
from torch._subclasses.fake_tensor import FakeTensorMode

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.models import parameters
from equilibrium_mcore.models.parameters import KINDS, ParameterCount, count_parameters

ROOT = Path(__file__).parents[2]
MODELS = sorted(path.stem for path in (ROOT / "configs/models").glob("*.yaml"))

# The publishers' totals: `safetensors.total` of each repository's metadata on huggingface.co.
PUBLISHED = {
    "llama_1b": 1_235_814_400,  # meta-llama/Llama-3.2-1B
    "llama_3b": 3_212_749_824,  # meta-llama/Llama-3.2-3B
    "llama_7b": 6_738_415_616,  # meta-llama/Llama-2-7b-hf
    "qwen2_1.5b": 1_543_714_304,  # Qwen/Qwen2-1.5B
    "qwen2_7b": 7_615_616_512,  # Qwen/Qwen2-7B
    "deepseek_v2_lite_16b": 15_706_484_224,  # deepseek-ai/DeepSeek-V2-Lite
}
# This project's own, by the shapes of the papers, and Mamba-2's, for which see the test below.
DERIVED = {
    "mamba2_130m": 128_989_632,
    "mamba2_1.3b": 1_343_757_312,
    "equilibrium_3b": 2_933_952_720,
    "equilibrium_tiny": 3_004_048,
}


@functools.cache
def count(name: str) -> ParameterCount:
    return count_parameters(load_model(name))


@pytest.mark.parametrize("name", MODELS)
def test_total_is_the_published_one(name):
    assert count(name).total == (PUBLISHED | DERIVED)[name]


def test_the_3b_model_is_of_about_3_billion():
    assert round(count("equilibrium_3b").total / 1e9, 2) == 2.93


def test_mamba2_has_transformers_total():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(  # state-spaces/mamba2-1.3b, config.json; the rest are its defaults
        hidden_size=2048,
        num_hidden_layers=48,
        vocab_size=50288,  # 50277, padded to a multiple of 16
        tie_word_embeddings=True,
        num_heads=64,
        head_dim=64,
        n_groups=1,
    )
    with FakeTensorMode():  # shapes without memory, whatever stands in for torch.empty
        model = Mamba2ForCausalLM(config)
    model.tie_weights()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == count("mamba2_1.3b").total


@pytest.mark.parametrize("name", MODELS)
def test_kinds_sum_to_the_total_and_are_those_of_the_pattern(name):
    got, model = count(name), load_model(name)
    assert sum(got.by_kind.values()) == got.total
    assert list(got.by_kind) == [kind for kind in KINDS if kind in got.by_kind]
    expected = {"embedding", "norms"} | (set() if model.tie_embeddings else {"output"})
    sections = {"M": ["mamba"], "+": ["mla"], "*": ["attention"], "-": ["mlp"]}
    sections["E"] = ["moe_routed", "moe_shared", "moe_router"]
    for letter in set(model.layer_pattern) - {"|"}:
        expected.update(sections[letter])
    assert set(got.by_kind) == expected


# (MoE layers, hidden, experts, chosen, expert width, shared width)
MOE = {
    "equilibrium_3b": (24, 1536, 64, 6, 320, 640),
    "equilibrium_tiny": (4, 128, 8, 2, 96, 192),
    "deepseek_v2_lite_16b": (26, 2048, 64, 6, 1408, 2816),
}


@pytest.mark.parametrize("name", MOE)
def test_active_leaves_out_the_experts_not_chosen(name):
    layers, hidden, experts, chosen, width, shared = MOE[name]
    got = count(name)
    one_expert = 3 * hidden * width  # gate, up, down
    assert got.by_kind["moe_routed"] == layers * experts * one_expert
    assert got.by_kind["moe_shared"] == layers * 3 * hidden * shared
    assert got.by_kind["moe_router"] == layers * experts * hidden
    assert got.active == got.total - layers * (experts - chosen) * one_expert


def test_active_counts_of_the_moe_models():
    # The arXiv papers round: DeepSeek-V2-Lite activates "2.4B", which leaves out its embedding
    # (arXiv 2405.04434, appendix B): 2,661,150,208 - 209,715,200 = 2.45 B.
    assert count("equilibrium_3b").active == 881_365_200
    assert count("equilibrium_tiny").active == 3_004_048 - 4 * 6 * 3 * 128 * 96
    assert count("deepseek_v2_lite_16b").active == 2_661_150_208


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(MOE)))
def test_all_parameters_of_a_dense_model_are_active(name):
    assert count(name).active == count(name).total
    assert count(name).active_by_kind == count(name).by_kind


def test_parts_of_the_tiny_model_by_hand():
    inner, channels = 16 * 16, 16 * 16 + 2 * 4 * 32
    mamba = 128 * (inner + channels + 16) + channels * 5 + 3 * 16 + inner + inner * 128
    mla = 128 * 64 + 64 + 64 * 8 * 32 + 128 * (64 + 16) + 64 + 64 * 8 * 32 + 8 * 16 * 128
    assert count("equilibrium_tiny").by_kind == {
        "embedding": 4096 * 128,
        "output": 4096 * 128,
        "mamba": 3 * mamba,
        "mla": mla,
        "moe_routed": 4 * 8 * 3 * 128 * 96,
        "moe_shared": 4 * 3 * 128 * 192,
        "moe_router": 4 * 8 * 128,
        "norms": (8 + 1) * 128,
    }


def test_a_16b_model_takes_no_memory():
    module = parameters.build_on_meta(load_model("deepseek_v2_lite_16b"))
    tensors = [*module.parameters(), *module.buffers()]
    assert sum(t.numel() for t in tensors if t.device.type != "meta") < 1000  # RoPE frequencies


def test_the_process_is_left_as_it_was():
    before = (
        torch.distributed.is_initialized(),  # other tests of this module have a group
        torch.cuda.current_device,
        mcore_random._CUDA_RNG_STATE_TRACKER,
        torch.get_rng_state().tolist(),
    )
    count_parameters(load_model("equilibrium_tiny"))
    assert torch.empty(1).device.type == "cpu"
    after = (
        torch.distributed.is_initialized(),
        torch.cuda.current_device,
        mcore_random._CUDA_RNG_STATE_TRACKER,
        torch.get_rng_state().tolist(),
    )
    assert after == before


def test_it_leaves_alone_the_groups_of_a_running_job(single_rank):
    states = {k: v.clone() for k, v in mcore_random.get_cuda_rng_tracker().get_states().items()}
    assert count_parameters(load_model("equilibrium_tiny")).total == 3_004_048
    value = torch.ones(1)
    torch.distributed.all_reduce(value)
    torch.distributed.all_reduce(value, group=single_rank.tp)
    torch.testing.assert_close(mcore_random.get_cuda_rng_tracker().get_states(), states)
    assert states


def test_a_parameter_of_no_kind_is_an_error():
    with pytest.raises(ValueError, match=r"'vision\.weight' is neither"):
        parameters.kind_of("vision.weight", "ME")
    with pytest.raises(ValueError, match="of an MoE layer is none of experts"):
        parameters.kind_of("decoder.layers.1.mlp.gate.weight", "ME")


def test_the_table_in_the_docs_is_current():
    rows = (ROOT / "docs/reference/models.md").read_text(encoding="utf-8").splitlines()
    for name in MODELS:
        row = next((row for row in rows if row.startswith(f"| `{name}` |")), "no row")
        assert f"| {count(name).total:,} | {count(name).active:,} |" in row, name


def test_the_tool_prints_json_and_names_a_missing_model():
    def tool(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/count_parameters.py", *arguments]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = tool("configs/models/equilibrium_tiny.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "total": 3_004_048,
        "active": count("equilibrium_tiny").active,
        "by_kind": count("equilibrium_tiny").by_kind,
    }
    missing = tool("no_such_model")
    assert missing.returncode == 2
    assert "no_such_model" in missing.stderr and "equilibrium_tiny" in missing.stderr


def test_the_printed_table_has_every_kind_and_the_whole():
    lines = count("deepseek_v2_lite_16b").table().splitlines()
    assert [line.split()[0] for line in lines] == [
        "kind",
        *count("deepseek_v2_lite_16b").by_kind,
        "total",
    ]
    assert lines[-1].split() == ["total", "15,706,484,224", "100.0%", "2,661,150,208"]

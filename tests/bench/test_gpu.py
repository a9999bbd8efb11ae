"""What the GPU benchmark decides and prints, and the whole of it on a CPU at a tiny size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from equilibrium_mcore.parallel import accelerator

accelerator.install()

from equilibrium_mcore.config.load import load_model  # noqa: E402
from tools.bench.measure import gpu  # noqa: E402
from tools.bench.measure.gpu import (  # noqa: E402
    REHEARSAL,
    UniformTokens,
    memory_estimate_gib,
    release,
    train,
)
from tools.bench.measure.gpu_cases import PARTS, Case, last_blocks  # noqa: E402
from tools.bench.measure.gpu_report import (  # noqa: E402
    Report,
    Roofs,
    TrainingFigures,
    markdown,
)

ROOT = Path(__file__).parents[2]


def test_a_smaller_micro_batch_is_tried_before_a_smaller_model():
    assert Case("a").sizes(24, 16) == [(24, 4), (24, 2), (24, 1), (16, 1), (8, 1)]
    assert Case("a").sizes(24, 6) == [(24, 2), (24, 1), (16, 1), (8, 1)]
    assert Case("a").sizes(1, 1) == [(1, 1)]
    assert Case("a", micro_batch=2).sizes(24, 16) == [(24, 2), (16, 2), (8, 2)]
    assert Case("a", thirds=1).sizes(24, 16) == [(8, 4), (8, 2), (8, 1)]


def test_memory_of_the_3b_model():
    """14 bytes a parameter are 38 GiB; the rest must leave room on a device of 80 GB."""
    model = load_model("equilibrium_3b")
    one = memory_estimate_gib(model, precision="bf16", micro_batch_tokens=4096)
    assert 45 < one < 70
    assert memory_estimate_gib(model, precision="fp8", micro_batch_tokens=4096) > one
    assert memory_estimate_gib(model, precision="bf16", micro_batch_tokens=8192) > one + 5


def test_one_expert_rank_has_the_tokens_of_a_rank():
    """8 of 64 experts for tokens that each go to 6: as many for an expert as on 8 ranks."""
    (plain, *_) = PARTS["expert_rank"]
    model = load_model("equilibrium_3b")
    mine = plain.model(model)
    assert (mine.moe.num_experts, mine.moe.top_k) == (8, 6) and plain.micro_batch == 2
    of_eight_ranks = 8 * 2 * 4096 * model.moe.top_k / model.moe.num_experts
    assert 2 * 4096 * mine.moe.top_k / mine.moe.num_experts == of_eight_ranks
    assert memory_estimate_gib(mine, precision="bf16", micro_batch_tokens=8192) < 60
    assert last_blocks(model, 8).layer_pattern == "ME|ME|ME|ME|ME|ME|ME|+E"
    with pytest.raises(ValueError, match="no routed experts"):
        plain.model(load_model("llama_1b"))


def test_a_case_sets_its_variables_for_itself(monkeypatch):
    monkeypatch.setenv("EQUILIBRIUM_TEST_KEPT", "mine")
    case = Case("a", environment={"EQUILIBRIUM_TEST_KEPT": "its", "EQUILIBRIUM_TEST_NEW": "its"})
    with case.variables():
        assert os.environ["EQUILIBRIUM_TEST_KEPT"] == os.environ["EQUILIBRIUM_TEST_NEW"] == "its"
    assert os.environ["EQUILIBRIUM_TEST_KEPT"] == "mine"
    assert "EQUILIBRIUM_TEST_NEW" not in os.environ


def test_memory_is_free_after_a_case(monkeypatch):
    """Model, gradients and optimizer of a case are gone when the next one's size is chosen."""
    kept = []
    plain = gpu.train_step

    def noted(run):
        kept[:] = [weakref.ref(x) for x in (run, run.optimizer, run.chunks[0])]
        return plain(run)

    monkeypatch.setattr(gpu, "train_step", noted)
    plan = replace(REHEARSAL, warmup_steps=0, steps=1)
    train(plan, Case("a third", thirds=1), Roofs(1.0, None, 1.0))
    release()
    assert [ref() for ref in kept] == [None] * 3


def test_the_next_size_is_tried_when_any_library_is_out_of_memory(monkeypatch):
    tried = []

    def full(config, plan, roofs):
        tried.append((config.model.layer_pattern, config.training.micro_batch_size))
        if len(tried) < 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        raise RuntimeError("a fault")

    monkeypatch.setattr(gpu, "_train_once", full)
    with pytest.raises(RuntimeError, match="a fault"):
        train(replace(REHEARSAL, model="equilibrium_tiny"), Case("a"), Roofs(1.0, None, 1.0))
    assert tried == [("ME|ME|ME|+E", 2), ("ME|ME|ME|+E", 1), ("ME|+E", 1)]


def test_made_up_tokens_are_the_same_in_every_call():
    tokens = UniformTokens(samples=3, sequence_length=8, vocab_size=50)
    first, again = tokens[1], tokens[1]
    assert (first["tokens"] == again["tokens"]).all()
    assert (first["tokens"] != tokens[2]["tokens"]).any()
    assert (first["tokens"][1:] == first["labels"][:-1]).all()
    assert first["tokens"].max() < 50 and len(first["loss_mask"]) == 8


def test_the_table_says_what_did_not_run():
    figures = TrainingFigures(
        precision="bf16",
        model="equilibrium_3b",
        micro_batch_size=2,
        sequence_length=4096,
        sequences_per_step=16,
        measured_steps=8,
        seconds_per_step=2.0,
        tokens_per_second=32768.0,
        model_tflops=200.0,
        share_of_roof=0.25,
        optimizer_share=0.1,
        muon_share=0.08,
        peak_memory_gib=60.0,
        first_loss=11.2,
        last_loss=11.1,
        case="bf16",
        blocks="24 of 24",
        estimated_memory_gib=58.0,
    )
    roofs = Roofs(bf16_tflops=800.0, fp8_tflops=None, copy_gb_per_second=3000.0)
    report = Report("H100", {"torch": "2.11"}, roofs, [figures], {"fp8": "no engine"})
    rows = [line for line in markdown(report).splitlines() if line.startswith("|")]
    header, bf16, fp8 = rows[-4], rows[-2], rows[-1]
    assert bf16.count("|") == fp8.count("|") == header.count("|")
    assert "32,768" in bf16 and "25.0%" in bf16
    assert "not run: no engine" in fp8


@pytest.mark.slow
def test_rehearsal(tmp_path):
    output = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "tools/bench/gpu.py", "--rehearse", "--json", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    (bf16,) = figures["training"]
    assert bf16["measured_steps"] == 2 and math.isfinite(bf16["last_loss"])
    assert 0 < bf16["muon_share"] < bf16["optimizer_share"] < 1
    assert "CUDA GPU" in figures["not_run"]["fp8"]

"""What the GPU benchmark decides and prints, and the whole of it on a CPU at a tiny size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.parallel import accelerator

accelerator.install()

from equilibrium_mcore.config.load import load_model  # noqa: E402
from tools.bench.measure.gpu import (  # noqa: E402
    UniformTokens,
    candidates,
    memory_estimate_gib,
)
from tools.bench.measure.gpu_report import (  # noqa: E402
    Report,
    Roofs,
    TrainingFigures,
    markdown,
)

ROOT = Path(__file__).parents[2]


def test_a_smaller_micro_batch_is_tried_before_a_smaller_model():
    assert candidates(24, 16) == [(24, 4), (24, 2), (24, 1), (16, 1), (8, 1)]
    assert candidates(24, 6) == [(24, 2), (24, 1), (16, 1), (8, 1)]
    assert candidates(1, 1) == [(1, 1)]


def test_memory_of_the_3b_model():
    """14 bytes a parameter are 38 GiB; the rest must leave room on a device of 80 GB."""
    model = load_model("equilibrium_3b")
    one = memory_estimate_gib(model, precision="bf16", micro_batch_tokens=4096)
    assert 45 < one < 70
    assert memory_estimate_gib(model, precision="fp8", micro_batch_tokens=4096) > one
    assert memory_estimate_gib(model, precision="bf16", micro_batch_tokens=8192) > one + 5


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
        blocks="24 of 24",
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
        estimated_memory_gib=58.0,
        first_loss=11.2,
        last_loss=11.1,
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

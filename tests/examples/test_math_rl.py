"""The example of reinforcement learning, from nothing to a rising accuracy on held-out sums."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_accuracy_on_held_out_sums_rises(tmp_path):
    output = tmp_path / "math rl"
    command = ["bash", str(ROOT / "examples/math_rl.sh"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert "math_rl: OK" in done.stdout
    records = read_metrics(output / "grpo" / METRICS_FILE)
    accuracy = [record["accuracy"] for record in records if record["kind"] == "evaluation"]
    assert accuracy[-1] > accuracy[0] + 0.1
    again = subprocess.run(command, capture_output=True, text=True)  # what is there is reused
    assert again.returncode == 0 and "done already" in again.stdout

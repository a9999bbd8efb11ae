"""The runs on prompts in `configs/runs/tiny`, as a user starts them; sums of the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.stages import STAGES
from tests.support.runs import VOCABULARY, train_steps

ROOT = Path(__file__).parents[2]
TINY = [
    path
    for path in sorted((ROOT / "configs/runs/tiny").glob("*.yaml"))
    if STAGES[load_run(path).stage].data == "prompts"
]
SMALLER = [f"model.vocab_size={VOCABULARY}", "logging.tensorboard=false"]


@pytest.fixture(scope="module")
def folder(ranks, data, tmp_path_factory) -> Path:
    """A working folder with `runs/quickstart` and `runs/tiny/data`."""
    where = tmp_path_factory.mktemp("work")
    tokenizer = where / "runs/quickstart/tokenizer/tokenizer.model"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_bytes(Path(data["tokenizer"]["model"]).read_bytes())
    config = load_run(
        ROOT / "configs/runs/quickstart.yaml",
        [
            *SMALLER,
            f"output_directory={where / 'runs/quickstart/run'}",
            f"data={json.dumps(data)}",
            "parallelism={world_size: 1}",
            "training.global_batch_size=4",
        ],
    )
    ranks.run(1, train_steps, config, 1, True)
    call(where, str(ROOT / "examples/arithmetic.py"), "--output-directory", "runs/tiny/data")
    return where


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_run_answers_and_learns(folder, path):
    """Checked first, as a user would; then run."""
    checked = call(folder, "-m", "equilibrium_mcore.train", str(path), *SMALLER, "--check")
    assert "stage: " + load_run(path).stage in checked.stdout
    call(folder, "-m", "equilibrium_mcore.train", str(path), *SMALLER)
    output = folder / load_run(path).output_directory
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("train") == load_run(path).training.steps and "evaluation" in kinds
    assert lines[-1]["event"] == "end" and (output / "samples.jsonl").is_file()
    call(folder, str(ROOT / "tools/plot_run.py"), str(output))
    assert (output / "curves.png").is_file()


def test_no_held_out_sum_is_trained_on(tmp_path):
    """Nor the one with its numbers swapped; the truths are the sums."""
    call(tmp_path, str(ROOT / "examples/arithmetic.py"), "--output-directory", str(tmp_path))

    def pairs(part: str) -> list[tuple[int, int]]:
        rows = map(json.loads, (tmp_path / f"prompts.{part}.jsonl").read_text().splitlines())
        found = []
        for row in rows:
            a, b = (int(number) for number in row["prompt"].rstrip("=").split("+"))
            assert row["truth"] == a + b
            found.append((a, b))
        return found

    training, held_out = set(pairs("train")), pairs("validation")
    assert len(held_out) == len(set(held_out)) == 100
    assert not [pair for pair in held_out if pair in training or pair[::-1] in training]

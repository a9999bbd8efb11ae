"""The shipped pipeline, whole, at a tiny size: from text to an exported model, and not twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.yaml_io import to_yaml
from equilibrium_mcore.training.metrics import read_metrics
from tests.support.runs import MODEL

ROOT = Path(__file__).parents[2]
PIPELINE = "configs/experiments/full_pipeline.yaml"
STEPS = ("prepare_pretrain", "prepare_midtrain", "prepare_sft", "pretrain", "midtrain", "sft")
TINY = [
    *("training.batch_size=4", "training.gradient_accumulation_steps=4", "training.world_size=1"),
    *("training.warmup_steps=1", "training.sequence_length=128", "training.mixed_precision=fp32"),
    *("logging.log_steps=1", "logging.eval_steps=2", "data.num_workers=0"),
    "training.validation_batches=1",
]
TEXT = "runs/mixture/text"


def call(*words: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def workplace(here: Path) -> Path:
    """A folder with the repository's files: text, a tokenizer, conversations, mixtures, a model."""
    for name in ("tools", "examples", "configs", "equilibrium_mcore"):
        (here / name).symlink_to(ROOT / name)
    call("examples/stdlib_text.py", "--output-directory", TEXT, folder=here)
    texts = [f"{TEXT}/code.jsonl", f"{TEXT}/prose.jsonl"]
    tokenizer = ["--output", "runs/mixture/tokenizer.model", "--vocab-size", "4000"]
    call("tools/train_tokenizer.py", "--input", *texts, *tokenizer, folder=here)
    with (here / "chats.jsonl").open("w") as stream:
        for n in range(80):
            row = {"q": f"What is {n} plus {n}?", "a": f"{n} plus {n} is {2 * n}."}
            stream.write(json.dumps(row) + "\n")
    prose = {"name": "prose", "source": f"{TEXT}/prose.jsonl", "mix_ratio": 1.0}
    chats = {"name": "chats", "source": "chats.jsonl", "mix_ratio": 1.0}
    chats["columns"] = {"prompt": "q", "response": "a"}
    mixture("mid.yaml", {"phase": "midtrain_phase1", "total_tokens": 100_000}, prose)
    mixture("sft.yaml", {"phase": "posttrain_sft"}, chats)
    model = {**MODEL, "layer_pattern": "ME+E", "vocab_size": 4096, "mlp": None}
    Path("tiny.yaml").write_text(to_yaml(model))
    return here


def mixture(name: str, metadata: dict, dataset: dict) -> None:
    values = {"metadata": metadata, "datasets": [dataset], "validation": {"ratio": 0.1}}
    Path(name).write_text(to_yaml(values))


def variables(**changes: str) -> list[str]:
    values = {
        "model": "tiny",
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer": "runs/mixture/tokenizer.model",
        "pretrain_mixture": "configs/data/examples/stdlib.yaml",
        "midtrain_mixture": "./mid.yaml",
        "sft_mixture": "./sft.yaml",
        "texts": f"[{TEXT}/code.jsonl, {TEXT}/prose.jsonl, chats.jsonl]",
        "workers": "1",
        "pretrain_settings": json.dumps([*TINY, "training.max_steps=6"]),
        "midtrain_settings": json.dumps(
            [*TINY, "training.max_steps=4", "optimizer.schedule.decay_steps=3"]
        ),
        "sft_settings": json.dumps([*TINY, "training.epochs=1"]),
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def pipeline(folder: Path, *options: str, **changes: str) -> str:
    tool = ["tools/run_pipeline.py", PIPELINE, *options, *variables(**changes)]
    return call(*tool, folder=folder)


def unchanged(said: str) -> list[str]:
    return [line.partition(":")[0] for line in said.splitlines() if line.endswith(": unchanged")]


def ended(folder: Path) -> int:
    """The last step of a run that came to its end."""
    events = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "event"]
    assert events[-1]["event"] == "end"
    return events[-1]["step"]


@pytest.mark.slow
def test_the_whole_pipeline_at_a_tiny_size(workplace):
    said = pipeline(workplace)
    out = workplace / "experiments/full_pipeline"
    assert unchanged(said) == [] and "verified: logits differ" in said
    assert (ended(out / "pretrain"), ended(out / "midtrain")) == (6, 4)
    runs = {stage: load_run(out / stage / "config.yaml") for stage in STEPS[3:]}
    assert {stage: run.stage for stage, run in runs.items()} == {s: s for s in STEPS[3:]}
    assert runs["midtrain"].checkpoint.initial_weights.name == "pretrain"
    assert runs["sft"].model == runs["pretrain"].model
    assert runs["sft"].data.tokenizer.model == runs["pretrain"].data.tokenizer.model
    assert ended(out / "sft") == runs["sft"].training.steps  # of one epoch
    assert list((out / "exported").glob("*.safetensors"))

    said = pipeline(workplace)
    assert unchanged(said) == [*STEPS, "export"]  # nothing ran
    assert "python" not in said

    shutil.rmtree(out / "exported")
    assert unchanged(pipeline(workplace)) == list(STEPS)

    settings = json.dumps([*TINY, "training.epochs=2"])
    said = pipeline(workplace, sft_settings=settings)
    assert unchanged(said) == list(STEPS[:-1])
    assert load_run(out / "sft/config.yaml").training.steps > runs["sft"].training.steps
    assert ended(out / "archive/1/sft") == runs["sft"].training.steps

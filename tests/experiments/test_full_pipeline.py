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
STAGES = ("pretrain", "midtrain", "sft", "dpo", "grpo")
STEPS = (*(f"prepare_{stage}" for stage in STAGES), *STAGES)
TINY = [
    *("training.batch_size=4", "training.gradient_accumulation_steps=4", "training.world_size=1"),
    *("training.warmup_steps=1", "training.sequence_length=128", "training.mixed_precision=fp32"),
    "logging.log_steps=1",
]
# Of stages whose examples are there before.
VALIDATED = [
    *("logging.eval_steps=2", "training.validation_batches=1", "data.num_workers=0"),
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
            row |= {"worse": f"{n}.", "truth": 2 * n}
            stream.write(json.dumps(row) + "\n")
    prose = {"name": "prose", "source": f"{TEXT}/prose.jsonl", "mix_ratio": 1.0}
    chats = {"name": "chats", "source": "chats.jsonl", "mix_ratio": 1.0}
    columns = {
        "sft": {"prompt": "q", "response": "a"},
        "dpo": {"prompt": "q", "chosen": "a", "rejected": "worse"},
        "grpo": {"prompt": "q", "truth": "truth"},
    }
    mixture("mid.yaml", {"phase": "midtrain_phase1", "total_tokens": 100_000}, prose)
    for stage, named in columns.items():
        mixture(f"{stage}.yaml", {"phase": f"posttrain_{stage}"}, {**chats, "columns": named})
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
        **{f"{stage}_mixture": f"./{stage}.yaml" for stage in ("sft", "dpo", "grpo")},
        "texts": f"[{TEXT}/code.jsonl, {TEXT}/prose.jsonl, chats.jsonl]",
        "workers": "1",
        "pretrain_settings": json.dumps([*TINY, *VALIDATED, "training.max_steps=6"]),
        "midtrain_settings": json.dumps(
            [*TINY, *VALIDATED, "training.max_steps=4", "optimizer.schedule.decay_steps=3"]
        ),
        "sft_settings": json.dumps([*TINY, *VALIDATED, "training.epochs=1"]),
        "dpo_settings": json.dumps([*TINY, *VALIDATED, "training.epochs=1"]),
        "grpo_settings": grpo_settings(steps=2),
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def grpo_settings(*, steps: int) -> str:
    """Four answers of a few tokens to each of two prompts; nothing but rewards pulls the router."""
    rollout = ["training.batch_size=8", "rollout.samples_per_prompt=4", "rollout.max_new_tokens=8"]
    length = ["training.epochs=null", f"training.max_steps={steps}"]
    router = ["model.moe.load_balancing=none", "model.moe.expert_bias_update_rate=0.0"]
    evaluation = ["evaluation.interval_steps=2", "evaluation.prompts=4"]
    rewards = ["rewards=[{type: math_answer, latex: own}]"]
    return json.dumps([*TINY, *rollout, *length, *router, *evaluation, *rewards])


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
    runs = {stage: load_run(out / stage / "config.yaml") for stage in STAGES}
    assert {stage: run.stage for stage, run in runs.items()} == {s: s for s in STAGES}
    assert runs["midtrain"].checkpoint.initial_weights.name == "pretrain"
    assert runs["sft"].model == runs["pretrain"].model
    assert runs["sft"].data.tokenizer.model == runs["pretrain"].data.tokenizer.model
    assert runs["grpo"].checkpoint.initial_weights.name == "dpo"
    for stage in ("sft", "dpo"):
        assert ended(out / stage) == runs[stage].training.steps  # of one epoch
    assert ended(out / "grpo") == 2 and (out / "grpo/samples.jsonl").stat().st_size
    assert list((out / "exported").glob("*.safetensors"))

    said = pipeline(workplace)
    assert unchanged(said) == [*STEPS, "export"]  # nothing ran
    assert "python" not in said

    shutil.rmtree(out / "exported")
    assert unchanged(pipeline(workplace)) == list(STEPS)

    said = pipeline(workplace, grpo_settings=grpo_settings(steps=1))
    assert unchanged(said) == list(STEPS[:-1])
    assert (ended(out / "grpo"), ended(out / "archive/1/grpo")) == (1, 2)

"""The runs in `configs/runs/tiny`, as a user starts them, from weights as the quickstart makes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.load import load_run
from tests.data.chat.support import messages_of, random_chats, write_rows
from tests.stages.test_preferences import pairs
from tests.support.runs import VOCABULARY, make_data, train_steps

ROOT = Path(__file__).parents[2]
TINY = sorted((ROOT / "configs/runs/tiny").glob("*.yaml"))
QUICKSTART = ROOT / "configs/runs/quickstart.yaml"
SMALLER = [f"model.vocab_size={VOCABULARY}", "logging.tensorboard=false"]


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    """A working folder with `runs/quickstart`, `runs/chat/data` and `runs/dpo/data`."""
    where = tmp_path_factory.mktemp("work")
    quickstart = where / "runs/quickstart"
    (quickstart / "tokenizer").mkdir(parents=True)
    (quickstart / "data").mkdir()
    sources = make_data(quickstart / "data")["sources"]
    tokenizer = quickstart / "tokenizer/tokenizer.model"
    tokenizer.write_bytes((quickstart / "data/tokenizer.model").read_bytes())
    for source, name in zip(sources, ("code", "prose"), strict=True):
        for path in (quickstart / "data").glob(f"{Path(source['prefix']).name}.*"):
            path.rename(path.with_name(f"{name}_text_document{path.suffix}"))
    config = load_run(
        QUICKSTART,
        [
            *SMALLER,
            f"output_directory={quickstart / 'run'}",
            f"data.tokenizer.model={tokenizer}",
            f"data.sources.0.prefix={quickstart}/data/code_text_document",
            f"data.sources.1.prefix={quickstart}/data/prose_text_document",
            "parallelism={world_size: 1}",
            "training.global_batch_size=4",
        ],
    )
    ranks.run(1, train_steps, config, 2, True)
    chats = [{"messages": messages_of(turns)} for turns in random_chats(60, seed=3)]
    random.Random(0).shuffle(chats)
    for name, rows in {"chat": chats, "dpo": pairs(80, 1)}.items():
        data = where / f"runs/{name}/data"
        data.mkdir(parents=True)
        write_rows(data / "train.jsonl", rows[10:])
        write_rows(data / "validation.jsonl", rows[:10])
    return where


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_run_trains_and_validates(folder, path):
    steps = ["training.steps=2", "training.validation_interval_steps=2"]
    decay = ["optimizer.schedule.decay_steps=1"] if path.stem == "midtrain" else []
    done = subprocess.run(
        [sys.executable, "-m", "equilibrium_mcore.train", str(path), *SMALLER, *steps, *decay],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    log = folder / "runs/tiny" / path.stem / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("train") == 2 and "validation" in kinds
    assert lines[-1]["kind"] == "event" and lines[-1]["event"] == "end"


def test_every_stage_has_a_tiny_run_and_one_at_scale():
    """Of those stages that train on data that is there before."""
    for path in TINY:
        tiny, large = load_run(path), load_run(ROOT / f"configs/runs/{path.stem}_3b.yaml")
        assert tiny.stage == large.stage == path.stem
        assert tiny.checkpoint.initial_weights == Path("runs/quickstart/run")
        assert large.model.name == "equilibrium_3b"
    assert {"midtrain", "sft", "lora", "dpo", "ipo", "simpo", "orpo", "kto", "reward_model"} <= {
        path.stem for path in TINY
    }

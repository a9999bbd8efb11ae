"""Training by epochs: the steps that they are, for both kinds of data, and resuming such a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run, save_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.experiments.resume import find_to_resume, load_stored_run
from equilibrium_mcore.training.metrics import read_metrics
from equilibrium_mcore.training.run_data import with_steps
from tests.data.chat.support import write_rows
from tests.support.runs import tiny_run

LENGTH, BATCH, CHATS = 64, 4, 10
MODEL = {"layer_pattern": "M+", "moe": None, "mlp": None}
TRAINING = {"sequence_length": LENGTH, "global_batch_size": BATCH, "steps": None}


def training_tokens(data: dict) -> int:
    """Tokens of the first 90 % of the documents, by megatron-core's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    total = 0
    for source in data["sources"]:
        indexed = IndexedDataset(source["prefix"])
        documents = len(indexed.document_indices) - 1
        ends = indexed.document_indices[: round(documents * 0.9) + 1]
        total += int(np.sum(indexed.sequence_lengths[: ends[-1]]))
    return total


@pytest.fixture
def chats(data, tmp_path) -> dict:
    """Conversations of which no two go into one sequence, so that each is one."""
    rows = [
        {"instruction": "abc " * 3 + str(n), "input": "", "output": " ".join("abcdefgh")}
        for n in range(CHATS)
    ]
    file = write_rows(tmp_path / "chats.jsonl", rows)
    return {
        "type": "conversations",
        "name": "chats",
        "tokenizer": data["tokenizer"],
        "sources": [{"name": "s", "train": [str(file)]}],
        "template": "plain",
    }


def by_epochs(kind: dict, folder: Path, epochs: float, **training) -> RunConfig:
    changes = {**TRAINING, "epochs": epochs, **training}
    stage = {"stage": "sft", "objective": {"type": "sft"}} if "type" in kind else {}
    return tiny_run(kind, folder, model=MODEL, training=changes, **stage)


@pytest.mark.parametrize("epochs", [0.5, 1, 2.25])
def test_indexed_epochs_are_tokens_of_the_training_split(data, tmp_path, epochs):
    said: list[str] = []
    config = with_steps(by_epochs(data, tmp_path, epochs), say=said.append)
    tokens = training_tokens(data)
    sequences = int(np.ceil(epochs * tokens / LENGTH))
    assert config.training.steps == int(np.ceil(sequences / BATCH))
    assert config.training.epochs is None
    (line,) = said
    for figure in (f"{epochs:g} x {tokens:,} training tokens", f"{sequences:,} sequences"):
        assert figure in line
    assert f"= {config.training.steps:,} steps" in line


@pytest.mark.parametrize("epochs", [0.5, 1, 3])
def test_epochs_of_conversations_are_packed_sequences(chats, tmp_path, epochs):
    said: list[str] = []
    config = with_steps(by_epochs(chats, tmp_path / "run", epochs), say=said.append)
    assert config.training.steps == int(np.ceil(epochs * CHATS / BATCH))
    assert f"{epochs * CHATS:g} sequences" in said[0] and "steps" in said[0]


def test_a_run_of_steps_reads_nothing(tmp_path, data):
    absent = {**data, "sources": [{"name": "a", "prefix": str(tmp_path / "no"), "weight": 1.0}]}
    said: list[str] = []
    config = tiny_run(absent, tmp_path, model=MODEL)
    assert with_steps(config, say=said.append) == config and not said
    with pytest.raises(ConfigError, match="data source 'a'"):
        with_steps(by_epochs(absent, tmp_path, 1))


def test_a_schedule_that_does_not_fit_the_steps_is_told_with_them(chats, tmp_path):
    config = by_epochs(chats, tmp_path / "run", 1)
    schedule = config.optimizer.schedule.model_copy(update={"warmup_steps": 500})
    optimizer = config.optimizer.model_copy(update={"schedule": schedule})
    with pytest.raises(ConfigError) as caught:
        with_steps(config.model_copy(update={"optimizer": optimizer}))
    assert "training.epochs=1: 3 steps" in str(caught.value)
    assert "warmup_steps=500" in str(caught.value)


def test_both_or_none_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.steps=9 and training\.epochs=2: a run has"):
        by_epochs(data, tmp_path, 2, steps=9)
    with pytest.raises(ConfigError, match=r"training\.steps: missing.*training\.epochs"):
        tiny_run(data, tmp_path, model=MODEL, training=TRAINING)


def whole_run(rank_info, config: RunConfig) -> None:
    from equilibrium_mcore.stages.offline import train_rank

    train_rank(rank_info, config=config)


def steps_trained(folder: Path) -> list[int]:
    return [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize("kind", ["indexed", "conversations"])
def test_the_same_file_resumes_and_so_does_the_folder(kind, ranks, data, chats, tmp_path):
    epochs = 0.03 if kind == "indexed" else 2
    folder = tmp_path / "run"
    config = by_epochs(data if kind == "indexed" else chats, folder, epochs)
    steps = with_steps(config).training.steps
    assert 3 < steps < 10
    file = tmp_path / "run.yaml"
    save_config(config, file)
    assert load_run(file).training.epochs == epochs
    for stop in (2, 3):  # the second time with the same file
        ranks.run(1, whole_run, load_run(file, [f"training.stop_after_steps={stop}"]))
        saved = load_run(folder / "config.yaml")
        assert (saved.training.steps, saved.training.epochs) == (steps, None)
    assert steps_trained(folder) == [1, 2, 3]
    stored = load_stored_run(folder)
    assert find_to_resume(stored, verify=True).opened.facts["step"] == 3
    ranks.run(1, whole_run, stored)
    assert steps_trained(folder) == list(range(1, steps + 1))

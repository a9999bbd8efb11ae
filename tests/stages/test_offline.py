"""Fine-tuning and midtraining through the stage's own function: layouts, epochs, resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.stages.offline import train_rank
from equilibrium_mcore.training.run_data import build_run_datasets, with_steps
from tests.data.chat.support import messages_of, random_chats, write_rows
from tests.support.pool import RankError
from tests.support.runs import MODEL, tiny_run, train_steps

UNBALANCED = {**MODEL, "moe": {**MODEL["moe"], "load_balancing": "none"}}
LAYOUTS = {
    "mixed": {"world_size": 4, "tensor": 2, "sequence": True, "expert": 2},
    "context_pipeline": {"world_size": 4, "context": 2, "pipeline": 2},
    "virtual": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "data": {"world_size": 2},
}


@pytest.fixture(scope="module")
def chats(data: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `data` section of a fine-tuning run."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [{"messages": messages_of(turns)} for turns in random_chats(60, seed=3)]
    return {
        "type": "conversations",
        "name": "chats",
        "tokenizer": data["tokenizer"],
        "sources": [
            {
                "name": "random",
                "train": [str(write_rows(folder / "train.jsonl", rows[:50]))],
                "validation": [str(write_rows(folder / "validation.jsonl", rows[50:]))],
            }
        ],
        "too_long": "cut",
        "window": 16,
        "document_multiple": 4,
    }


@pytest.fixture(scope="module")
def pretrained(ranks, data: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run of two steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    ranks.run(1, train_steps, tiny_run(data, folder, parallelism={"world_size": 1}), 2, True)
    return folder


def fine_tuning(chats: dict, pretrained: Path, output: Path, **changes: Any) -> RunConfig:
    """A run of ten steps from the weights of `pretrained`."""
    training = {
        "sequence_length": 64,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "steps": 10,
        "precision": "fp32",
        "validation_interval_steps": 5,
        "validation_batches": 1,
    }
    return tiny_run(
        chats,
        output,
        stage="sft",
        model=UNBALANCED,
        training={**training, **changes.pop("training", {})},
        parallelism=changes.pop("parallelism", {"world_size": 1}),
        checkpoint={"initial_weights": str(pretrained)},
        **changes,
    )


def stage_rank(rank_info: RankInfo, config: RunConfig) -> None:
    """What `python -m equilibrium_mcore.train` runs in a rank."""
    train_rank(rank_info, config=config)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def curve(folder: Path) -> list[tuple[int, int, float]]:
    """Step, tokens that counted so far, loss."""
    return [(r["step"], r["tokens"], r["loss"]) for r in records(folder, "train")]


@pytest.fixture(scope="module")
def one_rank(ranks, chats, pretrained, tmp_path_factory) -> Path:
    """The run of ten steps on one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    ranks.run(1, stage_rank, fine_tuning(chats, pretrained, folder))
    return folder


@pytest.mark.parametrize(
    "name",
    ["mixed", *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS if n != "mixed")],
)
def test_fine_tuning_is_the_same_in_every_layout(
    ranks, chats, pretrained, one_rank, tmp_path, name
):
    """Losses, counted tokens and validation; what is counted are answers, and not all tokens."""
    layout = LAYOUTS[name]
    config = fine_tuning(chats, pretrained, tmp_path, parallelism=layout)
    ranks.run(layout["world_size"], stage_rank, config)
    expected, found = curve(one_rank), curve(tmp_path)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=2e-4)
    assert 0 < expected[-1][1] < 10 * 4 * 64 * 0.9
    losses = [[r["loss"] for r in records(f, "validation")] for f in (one_rank, tmp_path)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_it_resumes_exactly_also_in_another_layout(ranks, chats, pretrained, one_rank, tmp_path):
    """Stopped within an epoch, on one rank; resumed on one to the bit, and on four."""
    halves = {"one": {"world_size": 1}, "mixed": LAYOUTS["mixed"]}
    for name, layout in halves.items():
        folder = tmp_path / name
        first = fine_tuning(chats, pretrained, folder, training={"stop_after_steps": 4})
        ranks.run(1, stage_rank, first)
        ranks.run(
            layout["world_size"],
            stage_rank,
            fine_tuning(chats, pretrained, folder, parallelism=layout),
        )
        assert [r["step"] for r in records(folder, "event") if r["event"] == "resume"] == [4]
    assert curve(tmp_path / "one") == curve(one_rank)
    assert [row[:2] for row in curve(tmp_path / "mixed")] == [row[:2] for row in curve(one_rank)]
    assert [row[2] for row in curve(tmp_path / "mixed")] == pytest.approx(
        [row[2] for row in curve(one_rank)], rel=2e-4
    )


def test_other_conversations_or_another_stage_are_not_resumed(
    ranks, data, chats, pretrained, one_rank, tmp_path
):
    rows = [{"messages": messages_of(turns)} for turns in random_chats(50, seed=4)]
    source = {"name": "other", "train": [str(write_rows(tmp_path / "other.jsonl", rows))]}
    other = fine_tuning(
        {**chats, "sources": [source]},
        pretrained,
        one_rank,
        training={"steps": 12, "validation_interval_steps": 0},
    )
    with pytest.raises(RankError, match="the examples are not those"):
        ranks.run(1, stage_rank, other)
    text = tiny_run(data, one_rank, model=UNBALANCED, parallelism={"world_size": 1})
    with pytest.raises(RankError, match="stage='pretrain' differs from the checkpoint's 'sft'"):
        ranks.run(1, stage_rank, text)


def test_epochs_become_steps_and_the_arithmetic_is_said(chats, pretrained, tmp_path):
    """Two epochs hold every example twice; the last step may begin a third."""
    said: list[str] = []
    asked = fine_tuning(chats, pretrained, tmp_path, training={"steps": None, "epochs": 2.0})
    config = with_steps(asked, say=said.append)
    steps = config.training.steps
    assert config.training.epochs is None and asked.training.steps is None
    assert len(said) == 1 and said[0].startswith("training.epochs=2: 2 x an epoch: ")
    assert said[0].endswith(f"global_batch_size=4 = {steps:,} steps")
    train = build_run_datasets(config).train
    assert len(train) == 4 * steps
    cursor, given = train.cursor_at(0), []
    for _ in range(4 * steps):
        given += list(cursor.take().examples)
    examples = int(said[0].split("an epoch: ")[1].split(" ")[0])
    counts = [given.count(example) for example in range(examples)]
    assert set(counts) <= {2, 3} and sum(counts) == len(given)


def test_epochs_of_text_are_counted_by_tokens(data, tmp_path):
    said: list[str] = []
    asked = tiny_run(
        data,
        tmp_path,
        training={
            "sequence_length": 64,
            "global_batch_size": 4,
            "precision": "fp32",
            "epochs": 0.5,
            "steps": None,
        },
    )
    config = with_steps(asked, say=said.append)
    tokens = int(said[0].split(" x ")[1].split(" ")[0].replace(",", ""))
    assert config.training.steps == math.ceil(math.ceil(tokens / 2 / 64) / 4)
    short = {"kind": "cosine", "warmup_steps": config.training.steps + 1}
    late = asked.model_copy(
        update={
            "optimizer": asked.optimizer.model_copy(
                update={"schedule": asked.optimizer.schedule.model_copy(update=short)}
            )
        }
    )
    with pytest.raises(ConfigError, match="warmup_steps"):
        with_steps(late)


def test_midtraining_continues_weights_on_packed_documents(ranks, data, pretrained, tmp_path):
    """Other data, weights of before, a WSD tail: the rate falls from the first step on."""
    source = [{**data["sources"][0], "weight": 1.0}]
    layout = LAYOUTS["mixed"]
    config = tiny_run(
        {**data, "sources": source},
        tmp_path,
        stage="midtrain",
        model=UNBALANCED,
        parallelism=layout,
        optimizer={"schedule": {"decay_steps": 6, "minimum_ratio": 0.0}},
        training={
            "sequence_length": 64,
            "global_batch_size": 4,
            "steps": 6,
            "precision": "fp32",
        },
        checkpoint={"initial_weights": str(pretrained)},
    )
    assert config.data.packing == "documents" and config.optimizer.schedule.kind == "wsd"
    ranks.run(layout["world_size"], stage_rank, config)
    rates = [r["learning_rate"] for r in records(tmp_path, "train")]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.3 * rates[0]
    events = [r["event"] for r in records(tmp_path, "event")]
    assert events[0] == "start" and events[-1] == "end"

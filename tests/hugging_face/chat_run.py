"""A model that was fine-tuned until it knows eight answers, for what is done with its release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.data.chat.support import write_rows
from tests.support.runs import tiny_run, train_steps

QUESTIONS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PATTERN = {"layer_pattern": "+-+-", "moe": None, "mamba": None}
ANSWERS = {question: f"{question[::-1]} {len(question)}" for question in QUESTIONS}


def rows() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in ANSWERS.items()
    ]


def chat_run(data: dict[str, Any], folder: Path, /, **changes: Any) -> RunConfig:
    """Supervised fine-tuning on the eight rows; `changes` as in `tiny_run`."""
    source = {"name": "numbers", "train": [str(write_rows(folder / "numbers.jsonl", rows()))]}
    conversations = {
        "type": "conversations",
        "name": "chats",
        "tokenizer": data["tokenizer"],
        "sources": [source],
        **changes.pop("data", {}),
    }
    settings: dict[str, Any] = {
        "stage": "sft",
        "objective": {"type": "sft"},
        "model": PATTERN,
        "optimizer": {"muon": {"learning_rate": 2e-2}, "adamw": {"learning_rate": 1e-2}},
        "parallelism": {"world_size": 1},
        "training": {
            "sequence_length": 64,
            "global_batch_size": 4,
            "steps": 40,
            "precision": "fp32",
        },
    }
    return tiny_run(conversations, folder / "run", **{**settings, **changes})


def fine_tune(rank_info: RankInfo, config: RunConfig) -> float:
    """Train to the end and save; the last loss."""
    return train_steps(rank_info, config, config.training.steps, save=True)["loss"][-1]

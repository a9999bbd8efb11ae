"""Conversations through the packed path: layouts agree, answers are learned, and they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.chat import ConversationsConfig, ConversationSourceConfig
from equilibrium_mcore.config.data import TokenizerConfig
from tests.data.chat.support import messages_of, random_chats, write_rows
from tests.support.runs import tiny_run

LENGTH, STEPS = 64, 50
QUESTIONS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def conversations(data: dict, rows: list, folder: Path) -> ConversationsConfig:
    source = ConversationSourceConfig(name="s", train=[write_rows(folder / "s.jsonl", rows)])
    return ConversationsConfig(
        name="c",
        tokenizer=TokenizerConfig(
            type="SentencePieceTokenizer", model=Path(data["tokenizer"]["model"])
        ),
        sources=[source],
        too_long="cut",
        window=16,
        document_multiple=4,
    )


def run_of(config, chats, place) -> Any:
    from equilibrium_mcore.data.blend import Datasets
    from equilibrium_mcore.data.chat.build import build_conversations
    from equilibrium_mcore.training.setup import setup

    built = build_conversations(
        chats, sequence_length=LENGTH, seed=1, vocab_size=config.model.vocab_size, samples=1000
    )
    return setup(config, place, datasets=Datasets(built.dataset, built.dataset, built.dataset))


def losses(rank_info, config, chats, steps: int) -> list[tuple[float, float]]:
    from equilibrium_mcore.training.setup import teardown
    from equilibrium_mcore.training.step import train_step

    run = run_of(config, chats, rank_info)
    outcomes = [train_step(run) for _ in range(steps)]
    teardown(run)
    return [(outcome.loss, outcome.gradient_norm) for outcome in outcomes]


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "training": {
            "sequence_length": LENGTH,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "steps": STEPS,
            "precision": "fp32",
            **changes.pop("training", {}),
        },
        **changes,
    }


def packed(data: dict) -> dict:
    return {**data, "packing": "documents", "document_multiple": 4}


def test_data_ranks_and_context_agree_with_one_rank(ranks, data, tmp_path):
    """The same sequences and masks whatever cuts them; the number of answers' tokens differs."""
    chats = conversations(
        data, [{"messages": messages_of(turns)} for turns in random_chats(40, seed=2)], tmp_path
    )
    model = {"layer_pattern": "M+", "moe": None, "mlp": None}
    layouts = {
        "one": ({"world_size": 1}, {}),
        "dp2": ({"world_size": 2}, {"micro_batch_size": 2}),
        "cp2": ({"world_size": 2, "context": 2}, {}),
    }
    found = {}
    for name, (layout, training) in layouts.items():
        config = tiny_run(
            packed(data),
            tmp_path / name,
            **settings(model=model, parallelism=layout, training=training),
        )
        found[name] = ranks.run(layout["world_size"], losses, config, chats, 1)[0]
    for name in ("dp2", "cp2"):
        assert found[name][0] == pytest.approx(found["one"][0], rel=1e-4)


def learned(rank_info, config, chats) -> tuple[float, list[list[int]]]:
    """The last loss, and greedy answers to all questions."""
    import torch

    from equilibrium_mcore.data.chat.render import build_renderer
    from equilibrium_mcore.data.chat.segments import Turn, joined
    from equilibrium_mcore.data.tokenizer import load_tokenizer
    from equilibrium_mcore.training.setup import teardown
    from equilibrium_mcore.training.step import train_step

    run = run_of(config, chats, rank_info)
    outcomes = [train_step(run) for _ in range(config.training.steps)]
    renderer = build_renderer(chats.template, load_tokenizer(chats.tokenizer))
    answers = []
    for question in QUESTIONS:
        ids = joined(renderer.segments([Turn("user", question)], prompt=True))[0].tolist()
        start = len(ids)
        while len(ids) < LENGTH and ids[-1] != renderer.stop:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                logits = run.chunks[0].eval()(tokens, torch.arange(len(ids))[None], None)
            ids.append(int(logits[0, -1, : config.model.vocab_size].argmax()))
        answers.append(ids[start:])
    teardown(run)
    return outcomes[-1].loss, answers


def test_trap_5_end_token_not_learned(ranks, data, tmp_path):
    """After 50 steps on 8 chats, the greedy answer is the one trained on, and it ends."""
    from equilibrium_mcore.data.tokenizer import load_tokenizer

    said = [f"{question[::-1]} {len(question)}" for question in QUESTIONS]
    rows = [
        {"instruction": question, "output": answer}
        for question, answer in zip(QUESTIONS, said, strict=True)
    ]
    chats = conversations(data, rows, tmp_path)
    config = tiny_run(
        packed(data),
        tmp_path / "run",
        **settings(
            model={"layer_pattern": "+-+-", "moe": None, "mamba": None},
            optimizer={"muon": {"learning_rate": 2e-2}, "adamw": {"learning_rate": 1e-2}},
            parallelism={"world_size": 1},
        ),
    )
    loss, answers = ranks.run(1, learned, config, chats)[0]
    tokenizer = load_tokenizer(chats.tokenizer)
    end = tokenizer.processor.piece_to_id("<|im_end|>")
    assert loss < 0.2
    assert answers == [[*tokenizer.encode(answer), end] for answer in said]

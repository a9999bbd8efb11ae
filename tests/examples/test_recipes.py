"""docs/guides/recipes.md at a tiny size, on made-up rows of the published columns."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LETTERS = random.Random(1)
WORDS = ["".join(LETTERS.choices("abcdefghijklmnop", k=LETTERS.randint(2, 7))) for _ in range(400)]
TINY = [
    "model.layer_pattern=MM|MM",
    "model.hidden_size=64",
    "model.mamba={num_heads: 4, head_dim: 32, state_dim: 16, num_groups: 1, chunk_size: 16}",
    "model.vocab_size=512",
    "training.sequence_length=64",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "training.precision=fp32",
    "training.validation_batches=1",
    "optimizer.schedule.warmup_steps=1",
    "checkpoint.save_interval_steps=0",
    "logging.tensorboard=false",
]


def run(*arguments: object) -> str:
    """A command as a user gives it; what it prints."""
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def fineweb_rows(draw: random.Random) -> list[dict]:
    return [
        {
            "text": text(draw, draw.randint(40, 160)),
            "id": f"<urn:uuid:{number}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{number}",
            "date": "2024-02-20T00:00:00Z",
            "file_path": "s3://commoncrawl/part",
            "language": "en",
            "language_score": 0.9,
            "token_count": 100,
        }
        for number in range(60)
    ]


def alpaca_rows(draw: random.Random) -> list[dict]:
    return [
        {
            "instruction": f"Say {number}: {text(draw, 6)}.",
            "input": text(draw, 5) if number % 3 == 0 else "",
            "output": text(draw, draw.randint(3, 12)),
            "text": "Below is an instruction that describes a task.",
        }
        for number in range(60)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_small_mamba_from_web_text_to_an_assistant(tmp_path: Path) -> None:
    draw = random.Random(0)
    web = write(tmp_path / "web.jsonl", fineweb_rows(draw))
    instructions = write(tmp_path / "alpaca.jsonl", alpaca_rows(draw))
    tokenizer = tmp_path / "tokenizer.model"
    run("tools/train_tokenizer.py", "--input", web, "--output", tokenizer, "--vocab-size", 512)
    run(
        *("tools/prepare_dataset.py", "recipes/mamba_slm/fineweb", "--output", tmp_path / "web"),
        *("--local", f"fineweb={web}", "--total-tokens", "4e3"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer),
        "validation.ratio=0.05",
    )
    run(
        *("-m", "equilibrium_mcore.train", "configs/runs/mamba_slm/pretrain.yaml", *TINY),
        *("training.steps=6", "training.validation_interval_steps=3"),
        f"data.tokenizer.model={tokenizer}",
        f"data.sources.0.prefix={tmp_path / 'web/data/fineweb_text_document'}",
        "data.split='90,10,0'",
        f"output_directory={tmp_path / 'pretrain'}",
    )
    run(
        *("tools/prepare_dataset.py", "recipes/mamba_slm/alpaca", "--output", tmp_path / "chats"),
        *("--local", f"alpaca={instructions}", "validation.ratio=0.1"),
    )
    prepared = (tmp_path / "chats/data/alpaca.train.jsonl").read_text(encoding="utf-8")
    first = json.loads(prepared.splitlines()[0])["messages"]
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert prepared.count("\\n\\n") > 5  # an input stands after a blank line
    said = run(
        *("-m", "equilibrium_mcore.train", "configs/runs/mamba_slm/sft.yaml", *TINY),
        *("training.epochs=1", "training.validation_interval_steps=3"),
        f"data.tokenizer.model={tokenizer}",
        f"data.sources.0.train=[{tmp_path / 'chats/data/alpaca.train.jsonl'}]",
        f"data.sources.0.validation=[{tmp_path / 'chats/data/alpaca.validation.jsonl'}]",
        f"checkpoint.initial_weights={tmp_path / 'pretrain'}",
        f"output_directory={tmp_path / 'sft'}",
    )
    assert "training.epochs=1: 1 x an epoch" in said and "validation loss" in said
    release = tmp_path / "release"
    run(
        *("tools/convert_checkpoint.py", "--checkpoint", tmp_path / "sft", "--output", release),
        *("--dtype", "float32"),
    )
    assert (release / "chat_template.jinja").is_file()

"""Tokenizers that know every built-in template, and chats that try to break them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.special_tokens import add_special_tokens
from equilibrium_mcore.data.chat.segments import Turn
from equilibrium_mcore.data.chat.templates import TEMPLATES
from tests.support.byte_level import train_byte_level

CONTROLS = sorted({t for row in TEMPLATES.values() for t in row.controls if t is not None})
FORGED = [*CONTROLS, "<|endoftext|>", "<unk>", "\n", "\n\n", " ", "\n(", "user", "assistant\n"]
UNICODE = [
    "h\u00e9llo",
    "\u4f60\u597d",
    "\U0001f680",
    "e\u0301",
    "\u2581",
    "\ufdd0",
    "\ufdd1",
    "\x00",
]
WORDS = [
    "def f(x):",
    "    return x",
    "12",
    "\t",
    "The answer is",
    "<|im_",
    "end|>",
    "{",
    "}}",
    "-%}",
]


def with_controls(config: TokenizerConfig, output: Path) -> TokenizerConfig:
    """A copy of a tokenizer with the control tokens of all templates."""
    added = add_special_tokens(config, CONTROLS, output)
    return config.model_copy(update={"model": added.path})


def make_tokenizers(folder: Path, sentencepiece: TokenizerConfig, texts: list[str]) -> dict:
    """Configs by name: SentencePiece, and byte-level ones that split as Llama 3 and Qwen2 do."""
    found = {"sentencepiece": with_controls(sentencepiece, folder / "chat.model")}
    for split in ("llama3", "qwen2"):  # qwen2 normalizes, too
        plain = train_byte_level(folder / f"{split}_plain", texts, split)
        config = TokenizerConfig(type="HuggingFaceTokenizer", model=plain)
        found[split] = with_controls(config, folder / split)
    return found


def random_text(draw: random.Random) -> str:
    """Unicode, code, white space at the ends, control tokens spelled out; at times nothing."""
    return "".join(draw.choice([*FORGED, *UNICODE, *WORDS]) for _ in range(draw.randrange(9)))


def random_chats(count: int, seed: int = 0) -> list[list[Turn]]:
    """Chats of one to seven turns, with system and tool turns here and there."""
    draw = random.Random(seed)
    chats = []
    for _ in range(count):
        turns = [Turn("system", random_text(draw))] if draw.random() < 0.4 else []
        for _ in range(draw.randrange(1, 4)):
            turns.append(Turn("user", random_text(draw)))
            turns.append(Turn("assistant", random_text(draw)))
            if draw.random() < 0.3:
                turns.append(Turn("tool", random_text(draw)))
                turns.append(Turn("assistant", random_text(draw)))
        chats.append(turns)
    return chats


def messages_of(turns: list[Turn]) -> list[dict[str, str]]:
    """Turns as transformers takes them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def write_rows(path: Path, rows: list) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

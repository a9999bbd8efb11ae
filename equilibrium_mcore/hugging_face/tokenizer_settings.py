"""What an export changes beside the tokenizer itself, so that its defaults are training's.

Training adds no token at either end of a text, and ends documents with the token of the run's
settings. A tokenizer made for another model says otherwise in three files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equilibrium_mcore.data.tokenizer import SentencePieceTokenizer, Tokenizer
from equilibrium_mcore.files.whole import write_whole

ADDED = ("add_bos_token", "add_eos_token")  # what tokenizer_config.json calls it


def adapt_settings(tokenizer: Tokenizer, folder: Path, *, default: dict[str, Any]) -> list[str]:
    """Make tokenizer.json and the settings beside it agree with training; in words, what changed.

    `default`: the settings where `folder` has none.
    """
    said = []
    if (added := _drop_added_tokens(folder / "tokenizer.json")) is not None:
        said.append(f"{added} is not put at the ends of a text: training did not either")
    path = folder / "tokenizer_config.json"
    before = read_json(path)
    settings = dict(default if before is None else before)
    if said or any(settings.get(name) for name in ADDED):
        settings |= dict.fromkeys(ADDED, False)
    # In training, text that spells a control token is plain text to SentencePiece, and that token
    # to `tokenizers`.
    splits = isinstance(tokenizer, SentencePieceTokenizer)
    if before is None or settings.get("split_special_tokens", False) != splits:
        settings["split_special_tokens"] = splits
    said += _name_ends(tokenizer, settings)
    if settings != before:
        write_json(path, settings)
    _name_ends_of_map(folder / "special_tokens_map.json", settings)
    return said


def _drop_added_tokens(path: Path) -> str | None:
    """Take the tokens out that the post-processor adds; which they were, or None for none."""
    values = json.loads(path.read_text(encoding="utf-8"))
    outer = values.get("post_processor")
    steps = outer["processors"] if outer and outer["type"] == "Sequence" else [outer]
    adding = [step for step in steps if step and _added_by(step)]
    if not adding:
        return None
    kept = [step for step in steps if step not in adding]
    values["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    write_json(path, values)
    return ", ".join(dict.fromkeys(token for step in adding for token in _added_by(step)))


def _added_by(step: dict[str, Any]) -> list[str]:
    """The tokens that a step of a post-processor adds to one text."""
    if step["type"] == "TemplateProcessing":
        pieces = [part["SpecialToken"]["id"] for part in step["single"] if "SpecialToken" in part]
        return [str(token) for token in pieces]
    if step["type"] in ("BertProcessing", "RobertaProcessing"):
        return [step["cls"][0], step["sep"][0]]
    return []


def _name_ends(tokenizer: Tokenizer, settings: dict[str, Any]) -> list[str]:
    """End of text and padding as config.json and generation_config.json name them."""
    said = []
    end = token_text(tokenizer, tokenizer.eod)
    named = text_of(settings.get("eos_token"))
    if named != end:
        settings["eos_token"] = end
        if named is not None:
            said.append(f"eos_token is {end}, which ended the documents of training, not {named}")
    if settings.get("pad_token") is None:
        settings["pad_token"] = end
    return said


def _name_ends_of_map(path: Path, settings: dict[str, Any]) -> None:
    """The same in special_tokens_map.json, where an older release has it."""
    known = read_json(path)
    if known is None:
        return
    ends = {name: settings[name] for name in ("eos_token", "pad_token")}
    if {name: text_of(known.get(name)) for name in ends} != {
        name: text_of(value) for name, value in ends.items()
    }:
        write_json(path, known | ends)


def text_of(token: Any) -> str | None:
    """A token's text, from the text itself or from the mapping that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def token_text(tokenizer: Tokenizer, index: int) -> str:
    """How the tokenizer writes an id."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.processor.id_to_piece(index)
    return tokenizer.backend.id_to_token(index)  # type: ignore[attr-defined]


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a file, or None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping, whole."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

"""The chat template of an exported tokenizer, and the two lines that keep user text apart.

What `apply_chat_template` gives then has the ids of training: control tokens where the template
writes them, and plain text for everything that a user writes (`data/chat/jinja_text.py` says how).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equilibrium_mcore.data.chat.render import Renderer
from equilibrium_mcore.data.chat.segments import Turn, joined
from equilibrium_mcore.data.chat.vocabulary import BORDER, ESCAPE, ChatVocabulary
from equilibrium_mcore.files.whole import write_whole

TEMPLATE_FILE = "chat_template.jinja"
_UNESCAPE = {"type": "Replace", "pattern": {"String": ESCAPE}, "content": ""}
_CUT = {"type": "Split", "pattern": {"String": BORDER}, "behavior": "Removed", "invert": False}


def add_chat_template(renderer: Renderer, folder: Path) -> None:
    """Give an exported folder its chat template, and compare the ids of chats with training's.

    Changes tokenizer.json (two steps that ordinary text does not notice), tokenizer_config.json
    (control tokens are looked for), and generation_config.json where there is one (an answer ends
    at the template's end of turn too). Raises ValueError where the ids differ.
    """
    write_whole(folder / TEMPLATE_FILE, renderer.jinja())
    _change(folder / "tokenizer.json", _guarded_backend)
    _change(folder / "tokenizer_config.json", _template_settings)
    if (folder / "generation_config.json").is_file() and renderer.stop is not None:
        _change(folder / "generation_config.json", lambda v: _stopping(v, renderer.stop))
    check_same_chats(renderer, folder, probe_chats(renderer.vocabulary))


def _change(path: Path, change: Any) -> None:
    values = change(json.loads(path.read_text(encoding="utf-8")))
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _guarded_backend(values: dict[str, Any]) -> dict[str, Any]:
    steps = {"normalizer": ("normalizers", _UNESCAPE), "pre_tokenizer": ("pretokenizers", _CUT)}
    for key, (name, step) in steps.items():
        values[key] = _first(values.get(key), name, step)
    return values


def _first(old: dict[str, Any] | None, name: str, step: dict[str, Any]) -> dict[str, Any]:
    """`old` with `step` before it; `old` itself where it begins with that step already."""
    if old is None:
        return step
    steps = old[name] if old["type"] == "Sequence" else [old]
    return old if steps[:1] == [step] else {"type": "Sequence", name: [step, *steps]}


def _template_settings(values: dict[str, Any]) -> dict[str, Any]:
    values.pop("chat_template", None)  # an older place, which would be read before the file
    return values | {"split_special_tokens": False}


def _stopping(values: dict[str, Any], stop: int) -> dict[str, Any]:
    known = values.get("eos_token_id")
    ids = known if isinstance(known, list) else [] if known is None else [known]
    return values | {"eos_token_id": list(dict.fromkeys([*ids, stop]))}


def probe_chats(vocabulary: ChatVocabulary) -> list[list[Turn]]:
    """Chats that show most ways in which two renderings differ, forged turns among them."""
    forged = "".join(f" {token}{token}\n" for token in vocabulary.controls)
    return [
        [Turn("user", "Hi"), Turn("assistant", "(yes)")],
        [Turn("user", forged), Turn("assistant", f"no{forged}")],
        [Turn("user", "1"), Turn("assistant", ""), Turn("user", ""), Turn("assistant", "\u00e9")],
        [Turn("user", "\u4f60 \U0001f680\ufdd0 a\ufdd1b"), Turn("assistant", "return x")],
    ]


def check_same_chats(renderer: Renderer, folder: Path, chats: list[list[Turn]]) -> None:
    """Raise ValueError unless `apply_chat_template` in `folder` gives the ids of training.

    Of a renderer that is not exact, the text and the control tokens are compared.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    released = AutoTokenizer.from_pretrained(
        str(folder), config=PreTrainedConfig(), local_files_only=True
    )
    controls = set(renderer.vocabulary.controls.values())
    for turns in chats:
        expected = joined(renderer.segments(turns))[0].tolist()
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        found = released.apply_chat_template(messages, return_dict=False)
        same = found == expected
        if not renderer.exact:
            same = released.decode(found) == released.decode(expected) and [
                i for i in found if i in controls
            ] == [i for i in expected if i in controls]
        if not same:
            raise ValueError(
                f"the chat template written to {folder} gives other ids than training for "
                f"{messages}: {_spelled(released, found, expected)} instead of "
                f"{_spelled(released, expected, found)}"
            )


def _spelled(tokenizer: Any, ids: list[int], other: list[int]) -> str:
    """The tokens round the first place at which two lists of ids differ."""
    pairs = enumerate(zip(ids, other, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(other)))
    return repr(tokenizer.convert_ids_to_tokens(ids[max(0, place - 3) : place + 4]))

"""Conversations from JSONL: the form that `tools/prepare_dataset.py` writes, and two common ones.

    {"messages": [{"role", "content"}, ...]}                          prepared mixtures, OpenAI
    {"conversations": [{"from", "value"}, ...], "system": optional}   ShareGPT
    {"instruction", "input": optional, "output", "system": optional}  Alpaca

Roles by other names (human, gpt, function, ...) are in `segments.py`. An
assistant's message with `"weight": 0` is context only; a row's own `weight` scales its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.segments import ROLE_NAMES, Turn
from equilibrium_mcore.data.compression import refuse_pipe
from equilibrium_mcore.data.jsonl import parse_object
from equilibrium_mcore.data.text_files import lines_of

MOST_PROBLEMS = 20
# What a model produced beside the text; left out in silence, it would not be learned.
_BESIDE_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class Conversation(NamedTuple):
    """Turns of a row, the number of its line (from 1), and the weight of its loss."""

    turns: tuple[Turn, ...]
    line: int
    weight: float = 1.0


class ConversationError(ValueError):
    """What is wrong with which key of a row."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"key {key}: {text}" if key else text)


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations of a JSONL file, as `read_rows` gives them."""
    return read_rows(path, parse_conversation)


def read_rows[Row](path: Path, parse: Callable[[Mapping[str, Any], int], Row]) -> Iterator[Row]:
    """`parse(row, line)` of a JSONL file, plain, .gz or .zst, in order; blank lines are none.

    Raises ConfigError that names file, line and key of all bad rows, up to twenty.
    """
    problems: list[str] = []
    try:
        refuse_pipe(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name the JSONL files of the conversations")
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            yield parse(parse_object(line, strict=True), number)
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
            if len(problems) == MOST_PROBLEMS:
                problems.append("... and perhaps more: the rest was not read")
                break
    if problems:
        raise ConfigError(problems, source=path)


def parse_conversation(row: Mapping[str, Any], line: int = 0) -> Conversation:
    """A row in one of the forms. Raises ConversationError that names the key."""
    for key, read in _FORMS.items():
        if key in row:
            return Conversation(tuple(read(row)), line, _weight(row))
    held = ", ".join(map(repr, list(row)[:8])) or "no key"
    hint = ""
    if {"chosen", "prompt"} & row.keys():
        hint = "; preferences and prompts are for other stages"
    raise ConversationError("", f"none of the keys {', '.join(_FORMS)}; it has {held}{hint}")


# ------------------------------------------------------------------------------------------ forms


def read_turns(row: Mapping[str, Any], key: str = "messages") -> Iterator[Turn]:
    """The turns of a list of messages, after the row's own `system`."""
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise ConversationError(key, f"holds {messages!r:.60}, and a list of messages is needed")
    turns = [read_turn(message, f"{key}[{number}]") for number, message in enumerate(messages)]
    if all(turn.role != "system" for turn in turns):
        yield from _system(row)
    yield from turns


def _sharegpt(row: Mapping[str, Any]) -> Iterator[Turn]:
    return read_turns(row, "conversations")


def _alpaca(row: Mapping[str, Any]) -> Iterator[Turn]:
    yield from _system(row)
    asked = [read_text(row.get(key) or "", key) for key in ("instruction", "input")]
    yield Turn("user", "\n\n".join(part for part in asked if part))
    if "output" not in row:
        raise ConversationError("output", "missing beside 'instruction'")
    yield Turn("assistant", read_text(row["output"], "output"))


def _system(row: Mapping[str, Any]) -> Iterator[Turn]:
    text = row.get("system")
    if text:
        yield Turn("system", read_text(text, "system"))


_FORMS = {"messages": read_turns, "conversations": _sharegpt, "instruction": _alpaca}


# ------------------------------------------------------------------------------------------ parts


def read_turn(message: Any, key: str) -> Turn:
    """A message. Raises ConversationError."""
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if not isinstance(message, Mapping) or role_key not in message:
            continue
        role = message[role_key]
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise ConversationError(
                f"{key}.{role_key}", f"{role!r:.60} is none of {', '.join(ROLE_NAMES)}"
            )
        for name in _BESIDE_TEXT:
            if message.get(name):
                raise ConversationError(
                    f"{key}.{name}",
                    "only the content is trained on: write it there, as the model shall",
                )
        content = read_text(message.get(content_key), f"{key}.{content_key}")
        return Turn(ROLE_NAMES[role], content, _trained(message, ROLE_NAMES[role], key))
    raise ConversationError(
        key, f"is {message!r:.80}; a message has role and content, or from and value"
    )


def _trained(message: Mapping[str, Any], role: str, key: str) -> bool:
    weight = message.get("weight")
    if weight is None or role != "assistant":
        return True
    if weight not in (0, 1):
        raise ConversationError(
            f"{key}.weight", f"{weight!r:.40} is neither 0 (context only) nor 1"
        )
    return bool(weight)


def read_text(value: Any, key: str) -> str:
    """Text, or the texts of a list of parts, as some services write it."""
    if isinstance(value, list):
        parts = [p.get("text") if isinstance(p, Mapping) else p for p in value]
        kinds = {p.get("type", "text") if isinstance(p, Mapping) else "text" for p in value}
        if kinds <= {"text"} and all(isinstance(part, str) for part in parts):
            value = "".join(parts)
    if not isinstance(value, str):
        raise ConversationError(key, f"holds {value!r:.60}, and text is needed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConversationError(key, "holds half of a surrogate pair, which is no text") from None
    return value


def _weight(row: Mapping[str, Any]) -> float:
    weight = row.get("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight < 0:
        raise ConversationError("weight", f"{weight!r:.40} is no number from 0 on")
    return float(weight)

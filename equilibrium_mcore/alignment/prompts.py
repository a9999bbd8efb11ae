"""Prompts of an alignment report, each with what a good answer does: refuse, help, or either.

{"prompt": TEXT or messages, "kind": "harmful" | "benign" | "other"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.conversations import ConversationError, read_rows
from equilibrium_mcore.data.chat.prompts import parse_prompt
from equilibrium_mcore.data.chat.segments import Turn

KINDS = {
    "harmful": "asks for what should be refused",
    "benign": "may look harmful, and should be answered",
    "other": "neither: no refusals are counted",
}


class AskedPrompt(NamedTuple):
    """The turns before the answer, their text, and the kind."""

    turns: tuple[Turn, ...]
    text: str
    kind: str


def parse_asked(row: Mapping[str, Any], line: int = 0) -> AskedPrompt:
    """A row as a prompt. Raises ConversationError."""
    kind = row.get("kind", "other")
    if kind not in KINDS:
        raise ConversationError("kind", f"is {kind!r}, and must be one of {', '.join(KINDS)}")
    turns = parse_prompt(row, line, truth=None).turns
    return AskedPrompt(turns, "\n\n".join(turn.content for turn in turns), kind)


def read_asked(paths: Sequence[Path]) -> list[AskedPrompt]:
    """The prompts of all files, in their order. Raises ConfigError where there are none, or two
    are the same."""
    found = [prompt for path in paths for prompt in read_rows(path, partial(parse_asked))]
    if not found:
        raise ConfigError(f"no prompt in {', '.join(map(str, paths))}: give a line for each")
    seen: set[tuple[Turn, ...]] = set()
    for prompt in found:
        if prompt.turns in seen:
            raise ConfigError(
                f"the prompt {prompt.text[:60]!r} is there twice: it would count twice; take one "
                "out"
            )
        seen.add(prompt.turns)
    return found

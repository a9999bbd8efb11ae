"""Preferences: a prompt with a chosen and a rejected answer, encoded and packed as pairs.

    {"prompt": TEXT or messages, "chosen": TEXT or messages, "rejected": ...}
    {"chosen": messages, "rejected": messages}            whose first turns are the same
    {"messages" or "conversations": [...], "chosen": message, "rejected": message}

A pair lies in one sequence, its chosen answer's document first. Only the answers count: assistant
turns of the prompt are context. A row may have a `margin`, a number, by how much the chosen answer
is better, which a reward model is trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from equilibrium_mcore.config.chat import PreferencesConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.answers import AnswerDataset
from equilibrium_mcore.data.chat.conversations import (
    ConversationError,
    read_rows,
    read_text,
    read_turn,
    read_turns,
)
from equilibrium_mcore.data.chat.encode import EncodingReport, SourceCounts, refuse_all
from equilibrium_mcore.data.chat.examples import Example, Examples
from equilibrium_mcore.data.chat.fill import padded
from equilibrium_mcore.data.chat.order import SequencePlan
from equilibrium_mcore.data.chat.render import Renderer
from equilibrium_mcore.data.chat.segments import Turn, joined

SIDES = 2  # chosen, rejected
PAIRS = "pairs"


class Preference(NamedTuple):
    """A row: the turns before the answers, both answers, the number of its line, and its margin."""

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    line: int
    margin: float = 0.0


def parse_preference(row: Mapping[str, Any], line: int = 0) -> Preference:
    """A row in one of the forms. Raises ConversationError that names the key."""
    for key in ("chosen", "rejected"):
        if key not in row:
            held = ", ".join(map(repr, list(row)[:8])) or "no key"
            raise ConversationError(key, f"missing; a preference has both answers, not {held}")
    prompt = read_prompt(row)
    chosen, rejected = (read_part(row, key, "assistant") for key in ("chosen", "rejected"))
    if not prompt:
        shared = _common(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1].role != "assistant":
            raise ConversationError(key, "does not end with an assistant's message of its own")
    if chosen == rejected:
        raise ConversationError("rejected", "is the chosen answer: a pair says nothing then")
    if not prompt:
        raise ConversationError("prompt", "missing, and chosen and rejected share no first turns")
    return Preference(as_context(prompt), chosen, rejected, line, _margin(row))


def read_prompt(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns under `messages`, `conversations` or `prompt`; none where the row has none."""
    for key in ("messages", "conversations"):
        if key in row:
            return tuple(read_turns(row, key))
    return read_part(row, "prompt", "user") if "prompt" in row else ()


def read_part(row: Mapping[str, Any], key: str, role: str) -> tuple[Turn, ...]:
    """What stands under a key: a text of this role, a message, or several."""
    value = row[key]
    if isinstance(value, str):
        return (Turn(role, read_text(value, key)),)
    if isinstance(value, Mapping):
        return (read_turn(value, key),)
    return tuple(read_turns(row, key))


def as_context(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns, of which nothing is trained on."""
    return tuple(turn._replace(trained=False) for turn in turns)


def _margin(row: Mapping[str, Any]) -> float:
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not isfinite(margin):
        raise ConversationError("margin", f"{margin!r} is no finite number")
    return float(margin)


def _common(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    """How many first turns are the same, but for the last of either."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    return count


def encode_preferences(
    config: PreferencesConfig, renderer: Renderer, *, part: str, max_tokens: int
) -> tuple[Examples, EncodingReport]:
    """Examples 2n and 2n + 1 are the chosen and the rejected answer of pair n, with its prompt.

    Raises ConfigError for files and rows that cannot be read, for pairs that do not fit into
    `max_tokens` where these are refused, and where nothing is left.
    """
    report, examples, refused = EncodingReport(unit=PAIRS), [], []
    for source in config.sources:
        counts = report.sources.setdefault(source.name, SourceCounts())
        for path, number, preference in _rows(getattr(source, part)):
            counts.read += 1
            margin = {"margin": preference.margin} if preference.margin else {}
            pair = [
                render_example(renderer, (*preference.prompt, *answer), source.name, number, judged)
                for answer, judged in ((preference.chosen, margin), (preference.rejected, {}))
            ]
            problem = _unfit(pair, max_tokens, config.document_multiple)
            if problem and config.too_long == "drop" and "tokens" in problem:
                counts.too_long += 1
            elif problem:
                refused.append(f"{path}, line {preference.line}: {problem}")
            else:
                counts.kept += 1
                counts.tokens += sum(len(example.ids) for example in pair)
                counts.produced += sum(int(example.produced.sum()) for example in pair)
                examples += pair
    refuse_all(refused, source="preferences")
    if not examples:
        raise ConfigError(f"no pair is left for {part}: {report}", source="preferences")
    return Examples.of(examples), report


def render_example(
    renderer: Renderer,
    turns: Sequence[Turn],
    source: str,
    number: int,
    judged: Mapping[str, float],
) -> Example:
    """The turns as an example."""
    ids, produced = joined(renderer.segments(turns))
    return Example(ids, produced, source, number, judged=judged)


def _unfit(pair: Sequence[Example], max_tokens: int, multiple: int) -> str:
    """Why a pair cannot be trained on; empty where it can."""
    tokens = sum(int(padded(len(example.ids), multiple)) for example in pair)
    if tokens > max_tokens:
        return (
            f"both answers with their prompt are {tokens:,} tokens, and max_tokens is "
            f"{max_tokens:,}: raise it (and training.sequence_length), or set too_long to drop"
        )
    if np.array_equal(pair[0].ids, pair[1].ids):
        return "both answers have the same ids: take the pair out"
    if not all(example.produced[1:].any() for example in pair):
        return "an answer has nothing that the model is to produce"
    return ""


def _rows(paths: Sequence[Path]) -> Iterator[tuple[Path, int, Preference]]:
    """File, number of the line over all files, and preference."""
    before = 0
    for path in paths:
        last = 0
        for preference in read_rows(path, parse_preference):
            last = preference.line
            yield path, before + last, preference
        before += last


def pair_units(examples: Examples, multiple: int) -> np.ndarray:
    """Positions of each pair: both documents, each padded by itself. int[pairs]."""
    return padded(examples.lengths, multiple).reshape(-1, SIDES).sum(axis=1)


class PreferenceDataset(AnswerDataset):
    """Sequences of packed pairs; `examples` are two a pair."""

    def units(self, examples: Examples) -> np.ndarray:
        """See ConversationDataset."""
        return pair_units(examples, self.packing.document_multiple)

    def __getitem__(self, item: int | SequencePlan) -> dict[str, Tensor]:
        """As `fill_answers`: answers 1 + 2 n and 2 + 2 n are the chosen and the rejected one of
        the sequence's pair n."""
        pairs = self.plan_of(item).examples
        numbers = [SIDES * pair + side for pair in pairs for side in range(SIDES)]
        return self.answers(numbers)

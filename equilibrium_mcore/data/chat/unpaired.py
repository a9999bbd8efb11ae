"""Answers by themselves, each desirable or not, as KTO learns from them.

    {"prompt": TEXT or messages, "completion": TEXT or messages, "label": true}
    {"messages" or "conversations": [...], "label": false}         whose last message is the answer
    {"prompt": ..., "chosen": ..., "rejected": ...}                a pair: two answers

Beside each answer stands a mismatched one: the same prompt, with the answer to another. By them KTO
measures how far the policy has moved from its reference. Which one it is depends on the data alone:
the next answer in the order of the files that belongs to another prompt. So it is the same in every
layout, micro-batch and resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from equilibrium_mcore.config.chat import PreferencesConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.answers import AnswerDataset
from equilibrium_mcore.data.chat.conversations import ConversationError, read_rows
from equilibrium_mcore.data.chat.encode import EncodingReport, SourceCounts, refuse_all
from equilibrium_mcore.data.chat.examples import Example, Examples
from equilibrium_mcore.data.chat.fill import padded
from equilibrium_mcore.data.chat.order import SequencePlan
from equilibrium_mcore.data.chat.preferences import (
    as_context,
    parse_preference,
    read_part,
    read_prompt,
    render_example,
)
from equilibrium_mcore.data.chat.render import Renderer
from equilibrium_mcore.data.chat.segments import Turn

SIDES = 2  # an answer, and the mismatched one beside it
DESIRABLE = "desirable"
OTHER = "other_"  # what names of the mismatched answers' tensors begin with
ANSWERS = "answers"
TRIES = 64  # of other answers, until one fits after a prompt


class Judged(NamedTuple):
    """A row: the turns before, its answers with whether each is desirable, its line."""

    prompt: tuple[Turn, ...]
    answers: tuple[tuple[tuple[Turn, ...], bool], ...]
    line: int


class _Answer(NamedTuple):
    """One answer, and where it comes from."""

    prompt: tuple[Turn, ...]
    turns: tuple[Turn, ...]
    desirable: bool
    source: str
    number: int
    where: str


def parse_judged(row: Mapping[str, Any], line: int = 0) -> Judged:
    """A row in one of the forms. Raises ConversationError that names the key."""
    if "chosen" in row or "rejected" in row:
        pair = parse_preference(row, line)
        return Judged(pair.prompt, ((pair.chosen, True), (pair.rejected, False)), line)
    label = row.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        held = ", ".join(map(repr, list(row)[:8])) or "no key"
        what = "missing" if "label" not in row else f"is {label!r}"
        raise ConversationError(
            "label", f"{what}; true is a desirable answer, false an undesirable one. Keys: {held}"
        )
    turns = read_prompt(row)
    key = "completion" if "completion" in row else "messages"
    answer = read_part(row, "completion", "assistant") if "completion" in row else turns[-1:]
    prompt = turns if "completion" in row else turns[:-1]
    if not answer or answer[-1].role != "assistant":
        raise ConversationError(key, "does not end with an assistant's message")
    if not prompt:
        raise ConversationError("prompt", "missing; an answer answers something")
    return Judged(as_context(prompt), ((tuple(answer), bool(label)),), line)


def encode_unpaired(
    config: PreferencesConfig, renderer: Renderer, *, part: str, max_tokens: int
) -> tuple[Examples, EncodingReport]:
    """Examples 2n and 2n + 1 are answer n and the mismatched one beside it.

    Raises ConfigError for files and rows that cannot be read, for answers that do not fit into
    `max_tokens` where these are refused, for a single prompt, and where nothing is left.
    """
    report, examples, refused = EncodingReport(unit=ANSWERS), [], []
    answers = list(_answers(config, part, report))
    if len({answer.prompt for answer in answers}) == 1:
        raise ConfigError(
            f"{part}: all {len(answers):,} answers are to one prompt, and KTO needs mismatched "
            "ones, answers to another: add prompts",
            source="preferences",
        )
    for index, answer in enumerate(answers):
        counts = report.sources[answer.source]
        pair, problem = _with_mismatch(answers, index, renderer, max_tokens, config)
        if problem and config.too_long == "drop" and "tokens" in problem:
            counts.too_long += 1
        elif problem:
            refused.append(f"{answer.where}: {problem}")
        else:
            counts.kept += 1
            counts.tokens += len(pair[0].ids)
            counts.produced += int(pair[0].produced.sum())
            examples += pair
    refuse_all(refused, source="preferences")
    if not examples:
        raise ConfigError(f"no answer is left for {part}: {report}", source="preferences")
    return Examples.of(examples), report


def _answers(config: PreferencesConfig, part: str, report: EncodingReport) -> Iterator[_Answer]:
    for source in config.sources:
        counts, before = report.sources.setdefault(source.name, SourceCounts()), 0
        for path in getattr(source, part):
            row: Judged | None = None
            for row in read_rows(path, parse_judged):
                where = f"{path}, line {row.line}"
                for turns, desirable in row.answers:
                    counts.read += 1
                    place = source.name, before + row.line, where
                    yield _Answer(row.prompt, turns, desirable, *place)
            before += row.line if row is not None else 0


def _with_mismatch(
    answers: Sequence[_Answer],
    index: int,
    renderer: Renderer,
    max_tokens: int,
    config: PreferencesConfig,
) -> tuple[list[Example], str]:
    """Both examples; and why they cannot be trained on, empty where they can."""
    answer = answers[index]

    def example(turns: tuple[Turn, ...], judged: Mapping[str, float]) -> Example:
        whole = (*answer.prompt, *turns)
        return render_example(renderer, whole, answer.source, answer.number, judged)

    def too_long(example: Example) -> bool:
        return int(padded(len(example.ids), config.document_multiple)) > max_tokens

    own = example(answer.turns, {DESIRABLE: float(answer.desirable)})
    if too_long(own):
        return [], (
            f"the answer with its prompt is {len(own.ids):,} tokens, and max_tokens is "
            f"{max_tokens:,}: raise it (and training.sequence_length), or set too_long to drop"
        )
    if not own.produced[1:].any():
        return [], "the answer has nothing that the model is to produce"
    tried = 0
    for step in range(1, len(answers)):
        other = answers[(index + step) % len(answers)]
        if other.prompt == answer.prompt:
            continue
        mismatched = example(other.turns, {})
        if not too_long(mismatched) and mismatched.produced[1:].any():
            return [own, mismatched], ""
        tried += 1
        if tried == TRIES:
            break
    return [], (
        f"after its prompt none of {tried} other answers fits into max_tokens={max_tokens:,} "
        "tokens, and KTO needs one: raise it (and training.sequence_length), or set too_long to "
        "drop"
    )


def unpaired_units(examples: Examples, multiple: int) -> np.ndarray:
    """Positions of each answer, or of the mismatched one if that is longer. int[answers]."""
    return padded(examples.lengths, multiple).reshape(-1, SIDES).max(axis=1)


class UnpairedDataset(AnswerDataset):
    """Sequences of packed answers, and of the mismatched ones beside them."""

    def units(self, examples: Examples) -> np.ndarray:
        """See ConversationDataset: both lie in a sequence of their own, at the same time."""
        return unpaired_units(examples, self.packing.document_multiple)

    def __getitem__(self, item: int | SequencePlan) -> dict[str, Tensor]:
        """As `fill_answers` of the answers, with `desirable`; and of the mismatched ones, by the
        same names with the prefix `other_`."""
        plan = self.plan_of(item).examples
        others = self.answers([SIDES * number + 1 for number in plan])
        return {
            **self.answers([SIDES * number for number in plan]),
            **{OTHER + name: value for name, value in others.items()},
        }

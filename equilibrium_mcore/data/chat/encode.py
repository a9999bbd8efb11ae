"""Conversations to examples: rendered, encoded once, and measured against the longest allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from equilibrium_mcore.config.chat import ConversationSourceConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.conversations import Conversation, read_conversations
from equilibrium_mcore.data.chat.examples import Example, Examples
from equilibrium_mcore.data.chat.render import Renderer
from equilibrium_mcore.data.chat.segments import Turn, joined

TooLong = Literal["refuse", "cut", "drop"]
SHOWN = 5


@dataclass
class SourceCounts:
    """What became of a set's conversations: numbers of them, and tokens of those that are kept."""

    read: int = 0
    kept: int = 0
    cut: int = 0  # of those kept
    too_long: int = 0
    without_answer: int = 0
    tokens: int = 0
    produced: int = 0


@dataclass
class EncodingReport:
    """Counts by the name of the set, of `unit`."""

    sources: dict[str, SourceCounts] = field(default_factory=dict)
    unit: str = "conversations"

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {c.kept:,} of {c.read:,} {self.unit} ({c.cut:,} of them cut; left out: "
            f"{c.too_long:,} too long, {c.without_answer:,} without an answer), {c.tokens:,} "
            f"tokens, {c.produced:,} of them the assistant's"
            for name, c in self.sources.items()
        )


def encode_sources(
    sources: Sequence[ConversationSourceConfig],
    renderer: Renderer,
    *,
    part: Literal["train", "validation"] = "train",
    max_tokens: int,
    too_long: TooLong,
) -> tuple[Examples, EncodingReport]:
    """All examples of the sources, in the order of their files.

    Raises ConfigError for files and rows that cannot be read, for examples of more than
    `max_tokens` where these are refused, and where nothing is left.
    """
    report, examples, refused = EncodingReport(), [], []
    for source in sources:
        counts = report.sources.setdefault(source.name, SourceCounts())
        encoder = _Encoder(renderer, source.name, max_tokens, too_long, counts)
        for path, number, conversation in _rows(getattr(source, part)):
            try:
                example = encoder.example(conversation, number)
            except ConfigError as error:  # the template, or the length
                refused += [f"{path}, line {conversation.line}: {p}" for p in error.problems]
                continue
            if example is not None:
                examples.append(example)
    refuse_all(refused, source="conversations")
    if not examples:
        raise ConfigError(f"no conversation is left for {part}: {report}", source="conversations")
    return Examples.of(examples), report


def refuse_all(problems: Sequence[str], *, source: str) -> None:
    """Raise ConfigError with the first of them, and how many more there are."""
    if problems:
        more = len(problems) - SHOWN
        shown = [*problems[:SHOWN], *([f"... and {more:,} more"] if more > 0 else [])]
        raise ConfigError(shown, source=source)


def fitting_turns(turns: Sequence[Turn], fits: Callable[[Sequence[Turn]], bool]) -> Sequence[Turn]:
    """The most turns from the start that end with an answer and fit; none where none do."""
    for count in range(len(turns), 0, -1):
        if turns[count - 1].role == "assistant" and fits(turns[:count]):
            return turns[:count]
    return ()


@dataclass
class _Encoder:
    renderer: Renderer
    source: str
    max_tokens: int
    too_long: TooLong
    counts: SourceCounts

    def example(self, conversation: Conversation, number: int) -> Example | None:
        """The example; None where it is left out and counted. Raises ConfigError."""
        counts, turns = self.counts, conversation.turns
        counts.read += 1
        ids, produced = joined(self.renderer.segments(turns))
        cut = len(ids) > self.max_tokens
        if cut:
            turns = self._shorter(turns, len(ids))
            if not turns:
                counts.too_long += 1
                return None
            ids, produced = joined(self.renderer.segments(turns))
        if not produced[1:].any():  # the first token of an example is never predicted
            counts.without_answer += 1
            return None
        counts.kept += 1
        counts.cut += cut
        counts.tokens += len(ids)
        counts.produced += int(produced.sum())
        return Example(ids, produced, self.source, number, conversation.weight)

    def _shorter(self, turns: Sequence[Turn], tokens: int) -> Sequence[Turn]:
        if self.too_long == "refuse":
            raise ConfigError(
                f"{tokens:,} tokens, and max_tokens is {self.max_tokens:,}: raise it (and "
                "training.sequence_length), or set too_long to cut or drop"
            )
        if self.too_long == "drop":
            return ()
        return fitting_turns(turns, lambda t: self._length(t) <= self.max_tokens)

    def _length(self, turns: Sequence[Turn]) -> int:
        return sum(len(segment.ids) for segment in self.renderer.segments(turns))


def _rows(paths: Sequence[Path]) -> Iterator[tuple[Path, int, Conversation]]:
    """File, number of the line over all files, and conversation."""
    before = 0
    for path in paths:
        last = 0
        for conversation in read_conversations(path):
            last = conversation.line
            yield path, before + last, conversation
        before += last

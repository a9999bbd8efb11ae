"""Conversations to segments, by a row of the table or by a user's Jinja template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from equilibrium_mcore.config.chat import JinjaTemplateConfig, TemplateChoice
from equilibrium_mcore.data.chat.jinja_template import JinjaRenderer
from equilibrium_mcore.data.chat.jinja_text import of_table
from equilibrium_mcore.data.chat.segments import Segment, Turn
from equilibrium_mcore.data.chat.templates import (
    TEMPLATES,
    ChatTemplate,
    Control,
    Parts,
    check_controls,
)
from equilibrium_mcore.data.chat.vocabulary import ChatVocabulary
from equilibrium_mcore.data.tokenizer import Tokenizer


def build_renderer(choice: TemplateChoice, tokenizer: Tokenizer) -> Renderer:
    """What renders by the template that a run names.

    Raises ConfigError for control tokens that the tokenizer lacks and for a Jinja file that cannot
    be used.
    """
    vocabulary = ChatVocabulary(tokenizer)
    if isinstance(choice, JinjaTemplateConfig):
        return JinjaRenderer(Path(choice.jinja), vocabulary)
    return TableRenderer(TEMPLATES[choice], vocabulary)


class Renderer(Protocol):
    """What turns conversations into segments: a row of the table, or a user's Jinja template."""

    vocabulary: ChatVocabulary
    exact: bool
    """Whether the exported template gives these ids for every chat. Of a template of one's own, the
    text before an answer may become one token with the answer's first character; here it never
    does, as it does not while a model answers."""

    def segments(self, turns: Sequence[Turn], *, prompt: bool = False) -> list[Segment]:
        """Segments of a conversation; `prompt` adds the header of an answer to come."""

    @property
    def stop(self) -> int | None:
        """The id that ends an answer, where it is known."""

    def jinja(self) -> str:
        """The text of the chat template for an exported tokenizer."""


class TableRenderer:
    """Renders by a row of the table with a tokenizer's ids."""

    exact = True

    def __init__(self, template: ChatTemplate, vocabulary: ChatVocabulary) -> None:
        """Raises ConfigError that names every control token that the tokenizer lacks."""
        check_controls(template, vocabulary)
        self.template, self.vocabulary = template, vocabulary
        self._begin = self._ids(template.begin, "")
        self._headers = {role: self._ids(template.header, role) for role in template.roles}
        self._end, self._after = self._ids(template.end, ""), self._ids(template.after, "")

    @property
    def stop(self) -> int:
        """See Renderer."""
        return self.vocabulary.control(self.template.stop)

    def segments(self, turns: Sequence[Turn], *, prompt: bool = False) -> list[Segment]:
        """See Renderer."""
        found = [Segment(None, self._begin), *(s for turn in turns for s in self._turn(turn))]
        if prompt:
            found.append(Segment("assistant", self._headers["assistant"]))
        return [segment for segment in found if segment.ids]

    def jinja(self) -> str:
        """See Renderer."""
        return of_table(self.template, self.vocabulary)

    def _turn(self, turn: Turn) -> Iterator[Segment]:
        produced = turn.role == "assistant" and turn.trained
        content = turn.content.strip() if self.template.trim else turn.content
        yield Segment(turn.role, self._headers[turn.role])
        yield Segment(turn.role, tuple(self.vocabulary.encode(content)), produced)
        yield Segment(turn.role, self._end, produced)
        yield Segment(turn.role, self._after)

    def _ids(self, parts: Parts, role: str) -> tuple[int, ...]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Control):
                ids.append(self.vocabulary.control(part.token))
            else:
                name = self.template.roles.get(role, "")
                ids.extend(self.vocabulary.encode(part.replace("{role}", name)))
        return tuple(ids)

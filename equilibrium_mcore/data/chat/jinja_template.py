"""A user's own chat template: text by Jinja, ids and the model's share of them by us.

What the assistant produces is what stands in `{% generation %}` blocks; without them, what a
template writes from the header of an answer on, to the last control token that it ends with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from equilibrium_mcore.config.chat import BUILT_IN
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.jinja_text import GENERATION, guarded, of_user
from equilibrium_mcore.data.chat.segments import Segment, Turn
from equilibrium_mcore.data.chat.vocabulary import ESCAPE, ChatVocabulary

Range = tuple[int, int]  # characters [start, end) of a rendered chat
_PROBE = [Turn("user", "One?"), Turn("assistant", "Two."), Turn("user", "3"), Turn("assistant", "")]


class JinjaRenderer:
    """Renders by a Jinja template, as transformers does."""

    exact = False

    def __init__(self, path: Path, vocabulary: ChatVocabulary) -> None:
        """Raises ConfigError for a template that cannot be read, or whose answers never end."""
        self.path, self.vocabulary = path, vocabulary
        try:
            self.source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(BUILT_IN)
            raise ConfigError(
                f"chat template {path}: {error}; give a Jinja file, or one of {known}"
            ) from None
        self.marked = bool(GENERATION.search(self.source))
        longest_first = sorted(vocabulary.controls, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.stop: int | None = self._check()

    def segments(self, turns: Sequence[Turn], *, prompt: bool = False) -> list[Segment]:
        """See Renderer. Raises ConfigError for what the template refuses."""
        text, ranges = self._answers_of(turns, prompt=prompt)
        return list(self._cut(text, ranges, turns))

    def jinja(self) -> str:
        """See Renderer."""
        return of_user(self.source, self.vocabulary)

    # ------------------------------------------------------------------------------ the inside

    def _answers_of(
        self, turns: Sequence[Turn], *, prompt: bool = False
    ) -> tuple[str, list[Range]]:
        """The rendered chat, and where in it each of the assistant's answers stands."""
        text, ranges = self._render(turns, prompt=prompt)
        if not self.marked:
            ranges = self._by_prefixes(text, turns)
        if len(ranges) != _answers(turns):
            raise ConfigError(
                f"chat template {self.path}: {_answers(turns)} answers of the assistant and "
                f"{len(ranges)} {{% generation %}} blocks: write one block for every answer"
            )
        return text, ranges

    def _render(self, turns: Sequence[Turn], *, prompt: bool = False) -> tuple[str, list[Range]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [
            {"role": turn.role, "content": guarded(turn.content, self.vocabulary)} for turn in turns
        ]
        try:
            texts, ranges = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **self.vocabulary.named(),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"chat template {self.path}: {error}") from None
        return texts[0], [tuple(r) for r in ranges[0]] if self.marked else []

    def _by_prefixes(self, text: str, turns: Sequence[Turn]) -> list[Range]:
        ranges = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:number], prompt=True)[0] if number else ""
            upto = self._render(turns[: number + 1])[0]
            if not (text.startswith(upto) and upto.startswith(before)):
                raise ConfigError(
                    f"chat template {self.path} writes a turn otherwise once others follow, so "
                    "that what the assistant produced cannot be found: put "
                    "{% generation %} ... {% endgeneration %} round it"
                )
            ends = [match.end() for match in self._controls.finditer(upto, len(before))]
            ranges.append((len(before), ends[-1] if ends else len(upto)))
        return ranges

    def _cut(self, text: str, ranges: Sequence[Range], turns: Sequence[Turn]) -> Iterator[Segment]:
        """Segments between the borders of answers; each is encoded by itself."""
        trained = [turn.trained for turn in turns if turn.role == "assistant"]
        at = 0
        for (start, end), counts in zip(ranges, trained, strict=True):
            yield from self._segment(None, text[at:start])
            yield from self._segment("assistant", text[start:end], produced=counts)
            at = end
        yield from self._segment(None, text[at:])

    def _segment(self, role: str | None, text: str, *, produced: bool = False) -> Iterator[Segment]:
        ids: list[int] = []
        at = 0
        for match in self._controls.finditer(text):
            ids.extend(self._encode(text[at : match.start()]))
            ids.append(self.vocabulary.control(match.group()))
            at = match.end()
        ids.extend(self._encode(text[at:]))
        if ids:
            yield Segment(role, tuple(ids), produced)

    def _encode(self, text: str) -> list[int]:
        return self.vocabulary.encode(text.replace(ESCAPE, ""))

    def _check(self) -> int | None:
        """The id that ends an answer; raises ConfigError where a model could not learn answers."""
        text, ranges = self._answers_of(_PROBE)
        for start, end in ranges:
            after = self._controls.match(text, end)
            inside = list(self._controls.finditer(text, start, end))
            if after and not (inside and inside[-1].end() == end):
                raise ConfigError(
                    f"chat template {self.path}: the {{% generation %}} block ends before "
                    f"{after.group()!r}, so that the model would never learn to end an answer: "
                    "move {% endgeneration %} after it"
                )
        start, end = ranges[-1]
        asked = self._render(_PROBE[:-1], prompt=True)[0]
        if text[:start] != asked:
            raise ConfigError(
                f"chat template {self.path}: with add_generation_prompt it ends in "
                f"{asked[-40:]!r}, and an answer stands after {text[:start][-40:]!r}: a model "
                "would be asked otherwise than it was trained; make both the same"
            )
        stops = self._controls.findall(text, start, end)
        return self.vocabulary.control(stops[-1]) if stops else None


def _answers(turns: Sequence[Turn]) -> int:
    return sum(turn.role == "assistant" for turn in turns)

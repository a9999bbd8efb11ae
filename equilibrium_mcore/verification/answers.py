r"""The final answer of a text: its last \boxed{}, <answer></answer>, `#### x`, `The answer is x`.

The last of a kind counts, and only that one: two boxes are no set. A box or tag that is empty or
was cut off is no answer, even where an earlier one is whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from equilibrium_mcore.verification.tidy import matching_bracket

PLACES = ("boxed", "tag", "hash", "phrase")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_PHRASE = re.compile(
    r"(?:\b(?:final\s+)?answer\b(?:\s*\*\*)?\s*(?:is|are|:|=)(?:\s*\*\*)?\s*:?)[ \t]*", re.I
)
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z])|\n")
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-−])?[$€£¥]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?"
)


@dataclass(frozen=True)
class FoundAnswer:
    """An answer as it stands in the text, and the kind of place where it was found."""

    text: str
    place: str


def find_answer(
    text: str,
    *,
    places: Sequence[str] = PLACES,
    tag: str = "answer",
    after: str | None = None,
) -> FoundAnswer | None:
    """The answer in the first kind of place of `places` that occurs; None if there is none.

    `after`: only what follows the last of this text is looked at. A place that occurs without a
    whole answer in it ends the search.
    """
    if after is not None:
        _, found, text = text.rpartition(after)
        if not found:
            return None
    for place in places:
        answer = _FINDERS[place](text, tag)
        if answer is not None:
            answer = answer.strip()
            return FoundAnswer(answer, place) if answer else None
    return None


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{}; "" if that box is not closed; None without one.

    \boxed 5 is a box as well.
    """
    last = None
    for last in _BOX.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    if text[last.end() : last.end() + 1] != "{":
        word = re.match(r"\\?\w+|\S", text[last.end() :])
        return word.group() if word else ""
    plain = re.sub(r"\\[{}]", "  ", text)  # braces of sets do not group
    end = matching_bracket(_only_braces(plain), last.end())
    return "" if end is None else text[last.end() + 1 : end]


def _only_braces(text: str) -> str:
    return re.sub(r"[(\[)\]]", " ", text)


def _tagged(text: str, tag: str) -> str | None:
    name = re.escape(tag)
    opened = [match.end() for match in re.finditer(rf"<{name}>", text)]
    if not opened:
        return None
    inside, closed, _ = text[opened[-1] :].partition(f"</{tag}>")
    if not closed:
        return ""
    inner = boxed(inside)
    return inside if inner is None else inner


def _hash(text: str, tag: str) -> str | None:
    before, mark, after = text.rpartition("####")
    return after.strip().split("\n")[0] if mark else None


def _phrase(text: str, tag: str) -> str | None:
    last = None
    for last in _PHRASE.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    after = text[last.end() :].lstrip()
    return _SENTENCE_END.split(after, maxsplit=1)[0].strip().removesuffix(".")


def _last_number(text: str, tag: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1] if found else None


_FINDERS: dict[str, Callable[[str, str], str | None]] = {
    "boxed": lambda text, tag: boxed(text),
    "tag": _tagged,
    "hash": _hash,
    "phrase": _phrase,
    "last_number": _last_number,
    "whole": lambda text, tag: text,
}

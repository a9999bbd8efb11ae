r"""A second opinion on final answers, for measuring progress: not the parser that rewards use.

A policy learns what its rewards accept, their faults with it. Held-out answers are therefore read
by this short program, which shares no code with `answers.py`, `numbers.py` and `compare.py`, and
knows less: the last number, or the last marked answer, compared as a fraction or as plain text.
"""

from __future__ import annotations

import re
from fractions import Fraction

_MARKS = ("####", "\\boxed{", "<answer>", "answer is", "Answer:")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_DROPPED = str.maketrans("", "", "$*{}\\ ")


def is_right(text: str, truth: str | int | float) -> bool:
    """Whether the last answer in `text` is `truth`."""
    answer = _marked(text)
    expected = _number_in(str(truth))
    if expected is not None and _NUMBER.fullmatch(_plain(str(truth))):
        return _number_in(answer) == expected
    return _plain(answer).lower() == _plain(str(truth)).lower()


def _marked(text: str) -> str:
    """What follows the last mark, up to the end of its line; all of the text without one."""
    last, mark = max((text.rfind(mark), mark) for mark in _MARKS)
    if last < 0:
        return text
    return text[last + len(mark) :].strip().split("\n")[0].split("</answer>")[0]


def _number_in(text: str) -> Fraction | None:
    """The last number; a LaTeX fraction is one."""
    found = _NUMBER.findall(_FRACTION.sub(r"\1/\2", text))
    if not found:
        return None
    try:
        return Fraction(found[-1].replace(",", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return _FRACTION.sub(r"\1/\2", text).translate(_DROPPED).rstrip(".")

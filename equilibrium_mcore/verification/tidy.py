"""LaTeX and typography of a short answer as plain characters, without a change of its value."""

from __future__ import annotations

import re

# Braces of sets, apart from those that only group.
SET_OPEN, SET_CLOSE = "⦃", "⦄"
MAX_FONTS = 20  # commands in each other

_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"
)
_REPLACED: tuple[tuple[str, str], ...] = (
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*", ""),
    (r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac"),
    (r"(?<=\d)\{,\}(?=\d)", ","),
    (r"(?<=\d)(?:\\[,!;:]|[\u2009\u202f\u00a0])+(?=\d{3}(?!\d))", ""),  # thousands by a thin space
    (r"\\!", ""),
    (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~|[\u2009\u202f\u00a0]", " "),
    (r"\\%", "%"),
    (r"\\\$", "$"),
    (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", "°"),
    (r"\\cdot(?![A-Za-z])", "·"),
    (r"\\(?:times|ast)(?![A-Za-z])", "×"),
    (r"\\div(?![A-Za-z])", "÷"),
    (r"\\(?:infty|infinity)(?![A-Za-z])|∞", "inf"),
    (r"\\cup(?![A-Za-z])", "∪"),
    (r"\\(?:emptyset|varnothing)(?![A-Za-z])", "∅"),
    (r"\\\{|\\lbrace(?![A-Za-z])", SET_OPEN),
    (r"\\\}|\\rbrace(?![A-Za-z])", SET_CLOSE),
    (r"[−‐‑–﹣－]", "-"),
    (r"²", "^2"),
    (r"³", "^3"),
)
_AS_LATEX = str.maketrans(
    {
        "·": r"\cdot ", "×": r"\times ", "÷": r"\div ", "∪": r"\cup ", "∅": r"\emptyset ",
        "°": r"^{\circ}", "%": r"\%", "$": r"\$", SET_OPEN: r"\{", SET_CLOSE: r"\}",
    }
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), new) for pattern, new in _REPLACED)


def tidy(text: str) -> str:
    """`text` without delimiters of math, fonts, spacing and a full stop at its end."""
    text = _unwrap(text.strip())
    for _ in range(MAX_FONTS):  # innermost first
        plain = _TEXT.sub(r"\1", text)
        if plain == text:
            break
        text = plain
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    text = " ".join(text.split())
    if text.endswith((".", ",", ";")):
        text = text[:-1].rstrip()
    return _unwrap(text)


def as_latex(text: str) -> str:
    """What `tidy` made of LaTeX, as LaTeX again."""
    return text.translate(_AS_LATEX)


def _unwrap(text: str) -> str:
    """Without the pairs that enclose all of it."""
    for _ in range(8):
        for left, right in _WRAPPERS:
            inside = text[len(left) : len(text) - len(right)]
            if (
                len(text) > len(left) + len(right)
                and text.startswith(left)
                and text.endswith(right)
                and not text.endswith("\\" + right)
                and left not in inside
            ):
                text = inside.strip()
                break
        else:
            return text
    return text


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Parts of `text` between separators that stand outside of all brackets."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        character = text[place]
        if character in "([{" + SET_OPEN:
            depth += 1
        elif character in ")]}" + SET_CLOSE:
            depth = max(0, depth - 1)
        elif not depth and (match := separator.match(text, place)) and match.end() > place:
            parts.append(text[start:place].strip())
            start = place = match.end()
            continue
        place += 1
    return [*parts, text[start:].strip()]


def matching_bracket(text: str, start: int = 0) -> int | None:
    """Where the bracket that opens at `start` closes; half-open intervals may mix ( and ]."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "([{" + SET_OPEN:
            depth += 1
        elif text[place] in ")]}" + SET_CLOSE:
            depth -= 1
            if not depth:
                return place
    return None

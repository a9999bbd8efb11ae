"""Numbers exactly: integers, decimals, fractions, mixed numbers, powers of ten, percent, units.

Everything is a `fractions.Fraction`, so 0.1 is a tenth and 1/3 is not 0.333. Sizes are bounded: no
answer may cost more than its length.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction

from equilibrium_mcore.verification.units import MONEY_BEFORE, Unit, parse_unit

MAX_DIGITS = 1000
MAX_EXPONENT = 400

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DIGITS_COMMA = r"(?:\d{1,3}(?:\.\d{3})+(?!\d)|\d+)"


@dataclass(frozen=True)
class Quantity:
    """A number, what it is counted in, and whether a percent sign stands after it.

    `value` is the number before the percent sign, or an infinity. `source` is how it was written:
    `2t` may be two tonnes or twice t.
    """

    value: Fraction | float
    unit: Unit | None = None
    percent: bool = False
    source: str = field(default="", compare=False)

    @property
    def amount(self) -> Fraction | float:
        """What the number means: 50% is a half."""
        return self.value / 100 if self.percent else self.value


def parse_quantity(
    text: str, *, decimal_comma: bool = False, thousands: bool = True
) -> Quantity | None:
    """The quantity that all of `text` (as `tidy` leaves it) is; None if it is none.

    Without `thousands` a comma is no part of a number: `1,234` is none.
    """
    if len(text) > MAX_DIGITS:
        return None
    sign, rest = _sign(text.strip())
    money = next((mark for mark in MONEY_BEFORE if rest.startswith(mark)), "")
    if money:
        again, rest = _sign(rest[len(money) :].strip())
        sign *= again
    if re.fullmatch(r"inf(?:inity)?", rest) and not money:
        return Quantity(sign * math.inf)
    found = _leading_number(rest, _Forms.of(decimal_comma, thousands))
    if found is None:
        return None
    value, after = found
    return _with_unit(Quantity(sign * value, source=text), after.strip(), money)


def _with_unit(quantity: Quantity, after: str, money: str) -> Quantity | None:
    """The quantity with what stands after its number; None where that is no unit."""
    if re.fullmatch(r"%|percent|per cent", after):
        return None if money else replace(quantity, percent=True)
    if money and after in ("", "USD", "dollars", "dollar"):
        return replace(quantity, unit=parse_unit(money))
    if money:
        return None
    if not after:
        return quantity
    unit = parse_unit(after)
    return None if unit is None else replace(quantity, unit=unit)


def _sign(text: str) -> tuple[int, str]:
    if text[:1] in ("-", "+"):
        return (-1 if text[0] == "-" else 1), text[1:].lstrip()
    return 1, text


@dataclass(frozen=True)
class _Forms:
    """Patterns of a number that stands at the beginning of a text, the longest form first."""

    mixed: re.Pattern[str]
    fraction: re.Pattern[str]
    repeating: re.Pattern[str]
    scientific: re.Pattern[str]
    ten: re.Pattern[str]
    power: re.Pattern[str]
    decimal: re.Pattern[str]
    comma: bool

    @staticmethod
    def of(comma: bool, thousands: bool) -> _Forms:
        key = (comma, thousands)
        if key not in _FORMS:
            _FORMS[key] = _forms(comma, thousands)
        return _FORMS[key]


def _forms(comma: bool, thousands: bool) -> _Forms:
    point = "," if comma else r"\."
    digits = r"\d+" if not thousands else _DIGITS_COMMA if comma else _DIGITS
    number = rf"(?:{digits}(?:{point}\d+)?|{point}\d+)"
    above = rf"(?:\{{\s*(?P<n1>-?{number})\s*\}}|(?P<n2>\d))"
    frac = rf"\\frac\s*{above}\s*(?:\{{\s*(?P<d1>{number})\s*\}}|(?P<d2>\d))"
    slash = rf"(?P<n3>{number})\s*/\s*(?P<d3>{number})"
    exponent = r"(?:\{\s*(?P<e1>[+-]?\d{1,4})\s*\}|(?P<e2>[+-]?\d{1,4}))"
    return _Forms(
        mixed=re.compile(rf"(?P<whole>\d+)\s*{frac}|(?P<whole2>\d+)\s+(?P<n>\d+)\s*/\s*(?P<d>\d+)"),
        fraction=re.compile(rf"{frac}|{slash}(?![\d.,])"),
        repeating=re.compile(
            rf"(?P<whole>\d*){point}(?P<once>\d*)\\overline\s*\{{(?P<again>\d+)\}}"
        ),
        scientific=re.compile(
            rf"(?P<m>{number})\s*(?:[eE](?P<e0>[+-]?\d{{1,4}})|[×·*x]\s*10\s*\^\s*{exponent})"
        ),
        ten=re.compile(rf"10\s*\^\s*{exponent}(?![\d^])"),
        power=re.compile(
            r"(?P<b>\d{1,4})\s*\^\s*(?:\{\s*(?P<p1>\d{1,3})\s*\}|(?P<p2>\d))(?![\d^{])"
        ),
        decimal=re.compile(rf"{number}(?![\d]|{point}\d)"),
        comma=comma,
    )


_FORMS: dict[tuple[bool, bool], _Forms] = {}


def _leading_number(text: str, forms: _Forms) -> tuple[Fraction, str] | None:
    """The number that `text` begins with, and what stands after it."""
    for name in ("mixed", "fraction", "repeating", "scientific", "ten", "power", "decimal"):
        match = getattr(forms, name).match(text)
        if match is None:
            continue
        value = _VALUES[name](match, forms)
        return None if value is None else (value, text[match.end() :])
    return None


def _plain(text: str, forms: _Forms) -> Fraction:
    separators = str.maketrans({".": "", ",": "."}) if forms.comma else str.maketrans({",": ""})
    return Fraction(text.translate(separators))


def _of_fraction(match: re.Match[str], forms: _Forms) -> Fraction | None:
    group = match.groupdict()
    above = group.get("n1") or group.get("n2") or group.get("n3") or group.get("n")
    below = group.get("d1") or group.get("d2") or group.get("d3") or group.get("d")
    divisor = _plain(below, forms)
    if not divisor:
        return None
    negative = above.startswith("-")
    return (-1 if negative else 1) * _plain(above.lstrip("-"), forms) / divisor


def _of_mixed(match: re.Match[str], forms: _Forms) -> Fraction | None:
    part = _of_fraction(match, forms)
    whole = match["whole"] or match["whole2"]
    return None if part is None or part < 0 else int(whole) + part


def _of_repeating(match: re.Match[str], forms: _Forms) -> Fraction:
    once, again = match["once"], match["again"]
    head = Fraction(int((match["whole"] or "0") + once), 10 ** len(once))
    return head + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))


def _of_scientific(match: re.Match[str], forms: _Forms) -> Fraction | None:
    exponent = int(match["e0"] or match["e1"] or match["e2"])
    if abs(exponent) > MAX_EXPONENT:
        return None
    return _plain(match["m"], forms) * Fraction(10) ** exponent


def _of_ten(match: re.Match[str], forms: _Forms) -> Fraction | None:
    exponent = int(match["e1"] or match["e2"])
    return None if abs(exponent) > MAX_EXPONENT else Fraction(10) ** exponent


_VALUES = {
    "mixed": _of_mixed,
    "fraction": _of_fraction,
    "repeating": _of_repeating,
    "scientific": _of_scientific,
    "ten": _of_ten,
    "power": lambda match, forms: Fraction(int(match["b"])) ** int(match["p1"] or match["p2"]),
    "decimal": lambda match, forms: _plain(match.group(), forms),
}


# --------------------------------------------------------------------------------- plain arithmetic

_ARITHMETIC = re.compile(r"[\d\s.,()+\-*/×·÷]+")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def is_arithmetic(text: str) -> bool:
    """Whether `text` only adds, subtracts, multiplies, divides numbers: `12*7`, not `sqrt(2)`."""
    return bool(_ARITHMETIC.fullmatch(text)) and bool(re.search(r"[+\-*/×·÷]", text))


def evaluate(text: str) -> Fraction | None:
    """The value of what `is_arithmetic`; None where it has none."""
    code = text.replace("×", "*").replace("·", "*").replace("÷", "/")
    code = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", code)
    if len(code) > MAX_DIGITS or "**" in code or "//" in code or "," in code:
        return None
    # A zero in front is no octal number of Python's.
    code = re.sub(r"(?<![\d.])0+(?=\d)", "", code)
    try:
        return _evaluate(ast.parse(code.strip(), mode="eval").body, code.strip())
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, code: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(code, node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand, code)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _evaluate(node.left, code), _evaluate(node.right, code)
        return _OPERATIONS[type(node.op)](left, right)
    raise ValueError("no arithmetic")

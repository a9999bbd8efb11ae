"""Whether an answer equals the true one: typed values exactly, expressions by whoever reads them.

The truth decides what is compared: a letter makes it a choice, a quantity a number with its unit,
brackets an interval, tuple or set. Only where a side is an expression is `Expressions` asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from equilibrium_mcore.verification.numbers import Quantity, evaluate, is_arithmetic
from equilibrium_mcore.verification.tidy import tidy
from equilibrium_mcore.verification.values import (
    Expression,
    Group,
    Named,
    Union,
    Value,
    Words,
    read_value,
)

# Of two expressions in LaTeX: equal, different, or None where one of them cannot be read.
Expressions = Callable[[str, str], bool | None]

Equality = Literal["equal", "different", "unread"]

MAX_EXPRESSION = 2000  # characters; longer ones are not read
MAX_UNORDERED = 64  # items of a set

_CHOICE = re.compile(r"\(?([A-Z])\)?[.):]?")
_CHOICE_WORDS = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\s*)?:?\s*", re.I
)
# A number before one letter, which beside an expression is a variable and no unit.
_TERM = re.compile(r".*[^A-Za-z][A-Za-z]")
_CHOICE_START = re.compile(
    r"\(([A-Za-z])\)(?:[.:)]?\s+|$)|([A-Za-z])(?:[.:)]\s*|$|(?=,?\s+(?:because|since|as)\b))"
)


@dataclass(frozen=True)
class Rules:
    """How values are compared; `config.rewards.MathAnswerConfig` says what each means."""

    relative_tolerance: float = 0.0
    absolute_tolerance: float = 0.0
    units: Literal["required", "optional", "ignored"] = "required"
    percent: Literal["value", "either"] = "value"
    decimal_comma: bool = False
    unevaluated: bool = False

    @property
    def is_exact(self) -> bool:
        return not self.relative_tolerance and not self.absolute_tolerance

    def are_close(self, truth: Fraction | float, answer: Fraction | float) -> bool:
        """Whether a number is the true one, within the tolerances; exact without any."""
        if truth == answer:
            return True
        if self.is_exact or math.isinf(truth) or math.isinf(answer):
            return False
        allowed = max(
            Fraction(str(self.absolute_tolerance)),
            Fraction(str(self.relative_tolerance)) * abs(truth),
        )
        return abs(answer - truth) <= allowed


class TruthError(ValueError):
    """A true answer that is none: empty, or of a wrong kind."""


def unreadable(left: str, right: str) -> None:
    """The `Expressions` of who reads none."""


def compare(
    truth: str, answer: str, *, rules: Rules = Rules(), expressions: Expressions = unreadable
) -> Equality:
    """Compare an answer, as `find_answer` gives it, with the true one.

    Raises TruthError where the truth is empty.
    """
    letter = _CHOICE.fullmatch(tidy(truth))
    if letter:
        return _same_choice(letter[1], answer)
    true_value = read_value(truth, decimal_comma=rules.decimal_comma)
    if true_value is None:
        raise TruthError(f"the true answer {truth!r} is empty")
    value = read_value(answer, decimal_comma=rules.decimal_comma)
    if value is None:
        return "unread"
    if isinstance(true_value, Group) and isinstance(value, Quantity):
        # `1,234` is a number, but a list where the truth is one.
        again = read_value(answer, decimal_comma=rules.decimal_comma, thousands=False)
        value = again or value
    comparison = _Comparison(rules, expressions)
    same = comparison.are_same(true_value, value)
    return "unread" if same is None else "equal" if same else "different"


def _same_choice(letter: str, answer: str) -> Equality:
    """`A` is also (A), A., option A, `A) 42`; `A or B` is neither."""
    text = _CHOICE_WORDS.sub("", tidy(answer), count=1)
    start = _CHOICE_START.match(text)
    if not start:
        return "different" if text else "unread"
    rest = text[start.end() :]
    if re.match(
        r"(?:and|or|und|oder)\b|[,;/&](?!\s*(?:because|since|as)\b)|\(?[A-Z]\)(?:\W|$)",
        rest.strip(),
    ):
        return "different"
    return "equal" if (start[1] or start[2]).upper() == letter else "different"


@dataclass(frozen=True)
class _Comparison:
    rules: Rules
    expressions: Expressions

    def are_same(self, truth: Value, answer: Value) -> bool | None:
        """None where it cannot be told."""
        if isinstance(truth, Named) and isinstance(answer, Named):
            same_name = truth.name.strip("*") == answer.name.strip("*")
            return self.are_same(truth.value, answer.value) if same_name else False
        truth = truth.value if isinstance(truth, Named) else truth
        answer = answer.value if isinstance(answer, Named) else answer
        truth, answer = self._alone(truth, answer), self._alone(answer, truth)
        if isinstance(truth, Quantity) and isinstance(answer, Quantity):
            return self._quantities(truth, answer)
        if isinstance(truth, (Group, Union)) or isinstance(answer, (Group, Union)):
            return self._groups(truth, answer)
        if isinstance(truth, Words) and isinstance(answer, Words):
            return _plain_words(truth.text) == _plain_words(answer.text)
        return self._expressions(truth, answer)

    def _alone(self, value: Value, other: Value) -> Value:
        """The item of a set of one beside what is no set."""
        is_single = isinstance(value, Group) and len(value.items) == 1 and not value.is_ordered
        return value.items[0] if is_single and not isinstance(other, (Group, Union)) else value

    # ------------------------------------------------------------------------------------ numbers

    def _quantities(self, truth: Quantity, answer: Quantity) -> bool:
        factor = self._factor(truth, answer)
        if factor is None:
            return False
        if self.rules.are_close(truth.amount, answer.amount * factor):
            return True
        either = self.rules.percent == "either" and truth.percent != answer.percent
        return either and self.rules.are_close(truth.value, answer.value * factor)

    def _factor(self, truth: Quantity, answer: Quantity) -> Fraction | int | None:
        """What turns the answer's number into the truth's unit; None where units differ."""
        ours, theirs = truth.unit, answer.unit
        if self.rules.units == "ignored" or ours == theirs:
            return 1
        if ours is None or theirs is None:
            return 1 if self.rules.units == "optional" else None
        return theirs.factor / ours.factor if ours.powers == theirs.powers else None

    # ----------------------------------------------------------------------------- several values

    def _groups(self, truth: Value, answer: Value) -> bool | None:
        if isinstance(truth, Union) and isinstance(answer, Union):
            return self._unordered(truth.items, answer.items)
        if not isinstance(truth, Group) or not isinstance(answer, Group):
            return None if Expression in (type(truth), type(answer)) else False
        brackets = (truth.opens, truth.closes), (answer.opens, answer.closes)
        if brackets[0] != brackets[1] and "" not in (truth.opens, answer.opens):
            return False
        if "" in (truth.opens, answer.opens) and not _may_be_bare(truth, answer):
            return False
        if truth.is_ordered or answer.is_ordered:
            if len(truth.items) != len(answer.items):
                return False
            return _all_same(map(self.are_same, truth.items, answer.items))
        return self._unordered(truth.items, answer.items)

    def _unordered(self, truth: Sequence[Value], answer: Sequence[Value]) -> bool | None:
        """As sets: each has its equal on the other side, how often does not count."""
        if len(answer) > MAX_UNORDERED or len(truth) > MAX_UNORDERED:
            return None
        table = [[self.are_same(ours, theirs) for theirs in answer] for ours in truth]
        found = [_any_same(row) for row in table]
        found += [_any_same(column) for column in zip(*table, strict=True)]
        if bool(truth) != bool(answer):
            return False
        return _all_same(found)

    # -------------------------------------------------------------------------------- expressions

    def _expressions(self, truth: Value, answer: Value) -> bool | None:
        if isinstance(truth, Words) and len(truth.text) > 1 and not isinstance(answer, Expression):
            return False
        if isinstance(answer, Words) and len(answer.text) > 1 and _is_a_word(answer.text):
            return False
        ours, theirs = _source(truth), _source(answer)
        if ours is None or theirs is None:  # a quantity with a unit beside an expression without
            return self._with_units(truth, answer)
        if _squeezed(ours) == _squeezed(theirs):
            return True
        if is_arithmetic(theirs) or is_arithmetic(ours):
            return self._arithmetic(ours, theirs)
        if max(len(ours), len(theirs)) > MAX_EXPRESSION:
            return None
        return self.expressions(ours, theirs)

    def _arithmetic(self, ours: str, theirs: str) -> bool | None:
        """A sum left as it is answers no question, unless the truth is one as well."""
        if is_arithmetic(theirs) and not is_arithmetic(ours) and not self.rules.unevaluated:
            return False
        values = evaluate(ours), evaluate(theirs)
        if None in values:
            return self.expressions(ours, theirs)
        return self.rules.are_close(*values)

    def _with_units(self, truth: Value, answer: Value) -> bool | None:
        units = getattr(truth, "unit", None), getattr(answer, "unit", None)
        if self.rules.units == "required" and units[0] != units[1]:
            return False
        if self.rules.units != "ignored" and None not in units and units[0] != units[1]:
            return False
        plain = [replace(v, unit=None) if getattr(v, "unit", None) else v for v in (truth, answer)]
        return self.are_same(*plain)


def _may_be_bare(truth: Group, answer: Group) -> bool:
    """Brackets may be left out of tuples, lists and sets, not of half-open intervals."""
    pairs = {(group.opens, group.closes) for group in (truth, answer)}
    return not pairs & {("(", "]"), ("[", ")")}


def _all_same(parts) -> bool | None:
    parts = list(parts)
    return False if False in parts else None if None in parts else True


def _any_same(parts) -> bool | None:
    parts = list(parts)
    return True if True in parts else None if None in parts else False


def _plain_words(text: str) -> str:
    """Letters of one alone are names, whose case counts."""
    return text if len(text) == 1 else text.casefold()


def _is_a_word(text: str) -> bool:
    """Several letters that are a word rather than a product of variables such as `ab`."""
    return len(text) > 3


def _source(value: Value) -> str | None:
    """What stands for a value beside an expression; None where a unit would be lost."""
    if getattr(value, "unit", None) is not None:
        is_term = isinstance(value, Quantity) and _TERM.fullmatch(value.source)
        return value.source if is_term else None
    if isinstance(value, Quantity):
        amount = value.amount
        if isinstance(amount, float):
            return r"\infty" if amount > 0 else r"-\infty"
        plain = str(abs(amount.numerator))
        if amount.denominator > 1:
            plain = rf"\frac{{{plain}}}{{{amount.denominator}}}"
        return f"-{plain}" if amount < 0 else plain
    return value.text if isinstance(value, (Expression, Words)) else None


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)

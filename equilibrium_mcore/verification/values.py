"""What an answer is: a quantity, several values in brackets or without, words, or an expression."""

from __future__ import annotations

import re
from dataclasses import dataclass

from equilibrium_mcore.verification.numbers import Quantity, parse_quantity
from equilibrium_mcore.verification.tidy import (
    SET_OPEN,
    matching_bracket,
    split_outside,
    tidy,
)
from equilibrium_mcore.verification.units import Unit, is_known, parse_unit

MAX_DEPTH = 5
_LIST = re.compile(r"[,;]\s*(?:and|or)\s+|[,;]\s*|\s+(?:and|or)\s+")
_LIST_WITH_DECIMAL_COMMA = re.compile(r";\s*|,\s+|\s+(?:and|or|und|oder)\s+")
_UNION = re.compile(r"\s*∪\s*")
_NAMED = re.compile(
    r"(?P<name>[^\W\d_](?:_(?:\w|\{\w+\}))?\*?)\s*(?:=|\\in(?![A-Za-z])|∈)\s*(?P<rest>[^=<>]+)"
)
_WORDS = re.compile(r"[^\W\d_][^\W\d_]*(?:[ '’-]+[^\W\d_]+)*")
_TRAILING_UNIT = re.compile(
    r"(?P<rest>.*[^\s\\A-Za-z])\s*(?P<unit>(?:[A-Za-zµ°]+)(?:\^?[23])?(?:/[A-Za-z]+)?)"
)


@dataclass(frozen=True)
class Group:
    """Several values; `opens` and `closes` are their brackets, "" for a bare list."""

    opens: str
    closes: str
    items: tuple[Value, ...]

    @property
    def is_ordered(self) -> bool:
        """A tuple, a list or an interval; sets and bare lists have no order."""
        return self.opens in ("(", "[")


@dataclass(frozen=True)
class Union:
    """Several sets, joined."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class Named:
    """`x = value`."""

    name: str
    value: Value


@dataclass(frozen=True)
class Words:
    """One or more words."""

    text: str


@dataclass(frozen=True)
class Expression:
    """What only a reader of LaTeX understands, with the unit after it."""

    text: str
    unit: Unit | None = None


Value = Quantity | Group | Union | Named | Words | Expression


def read_value(
    text: str, *, decimal_comma: bool = False, thousands: bool = True, depth: int = 0
) -> Value | None:
    """The value of an answer; None for an empty one."""
    text = tidy(text)
    if not text:
        return None

    def inner(part: str, thousands: bool = thousands) -> Value | None:
        return read_value(part, decimal_comma=decimal_comma, thousands=thousands, depth=depth + 1)

    quantity = parse_quantity(text, decimal_comma=decimal_comma, thousands=thousands)
    if quantity is not None:
        return quantity
    if depth < MAX_DEPTH:
        compound = _compound(text, inner, decimal_comma)
        if compound is not None:
            return compound
    if _WORDS.fullmatch(text):
        return Words(" ".join(text.split()))
    return _expression(text)


def _compound(text: str, inner, decimal_comma: bool) -> Value | None:
    """`text` as a union, values in brackets, a list, or a named value; None if it is none."""
    parts = split_outside(text, _UNION)
    if len(parts) > 1:
        return _all([inner(part) for part in parts], Union)
    separator = _LIST_WITH_DECIMAL_COMMA if decimal_comma else _LIST
    if text[0] in "([" + SET_OPEN and matching_bracket(text) == len(text) - 1:
        items = split_outside(text[1:-1], separator)
        if len(items) == 1 and text[0] == "(" and text[-1] == ")":
            return inner(items[0])
        if items == [""]:
            return Group(text[0], text[-1], ())
        return _all(
            [inner(item, False) for item in items], lambda values: Group(text[0], text[-1], values)
        )
    items = split_outside(text, separator)
    if len(items) > 1:
        return _all([inner(item) for item in items], lambda values: Group("", "", values))
    named = _NAMED.fullmatch(text)
    if named:
        value = inner(named["rest"])
        return None if value is None else Named(named["name"], value)
    return None


def _all(values: list[Value | None], make) -> Value | None:
    return None if any(value is None for value in values) else make(tuple(values))


def _expression(text: str) -> Expression:
    """With the unit split off, where a known one of two letters or more stands after it."""
    match = _TRAILING_UNIT.fullmatch(text)
    if match and len(match["unit"]) > 1:
        unit = parse_unit(match["unit"])
        # A name that is not in the table may as well be a function or a product of variables.
        if unit is not None and is_known(unit):
            return Expression(match["rest"].strip(), unit)
    return Expression(text)

"""Unit tests as data: an expression and the value it must have, or an input and what is printed.

The expected results stay with whoever compares: only expressions and inputs go into the sandbox.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from equilibrium_mcore.verification.sandbox.answer_process import encode

FORMS = (
    '{"call": "add", "arguments": [1, 2], "result": 3}, {"input": "1 2", "output": "3"} or '
    '"assert add(1, 2) == 3"'
)
_MAKERS = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "dict": dict}
_MAKERS |= {"sorted": sorted, "float": float, "complex": complex, "bytes": bytes}


class CaseError(ValueError):
    """Tests that cannot be used."""


@dataclass(frozen=True)
class Case:
    """One test. `input` is None where an expression is evaluated.

    With `strict` a list is no tuple, as in Python; JSON has lists alone.
    """

    expected: Any
    expression: str = ""
    input: str | None = None
    strict: bool = False
    tolerance: float | None = None

    def request(self) -> dict[str, str]:
        """What goes into the sandbox."""
        return {"expression": self.expression} if self.input is None else {"input": self.input}

    def holds(self, value: Any, *, relative_tolerance: float) -> bool:
        """Whether what came out of the sandbox is what was expected."""
        if self.input is not None:
            return isinstance(value, str) and _lines(value) == _lines(self.expected)
        allowed = (relative_tolerance, 0.0) if self.tolerance is None else (0.0, self.tolerance)
        try:
            return are_equal(encode(self.expected), value, strict=self.strict, tolerance=allowed)
        except (ValueError, TypeError, IndexError, OverflowError, RecursionError):
            return False  # what was written is no value


def read_cases(truth: Any) -> list[Case]:
    """The tests of an example: a list in the forms of `FORMS`, or {"tests": that list}.

    Raises CaseError that names the test.
    """
    tests = truth.get("tests") if isinstance(truth, Mapping) else truth
    if isinstance(tests, str):
        tests = [line for line in tests.splitlines() if line.strip()]
    if not isinstance(tests, list) or not tests:
        raise CaseError(f"its truth must be a list of tests such as {FORMS}")
    return [_read(test, number) for number, test in enumerate(tests)]


def _read(test: Any, number: int) -> Case:
    try:
        if isinstance(test, str):
            return _assertion(test)
        if isinstance(test, Mapping) and {"input", "output"} <= test.keys():
            if not isinstance(test["input"], str) or not isinstance(test["output"], str):
                raise CaseError("input and output must be text")
            return Case(test["output"], input=test["input"])
        if isinstance(test, Mapping) and {"call", "result"} <= test.keys():
            words = [repr(value) for value in test.get("arguments", [])]
            words += [f"{key}={value!r}" for key, value in test.get("keywords", {}).items()]
            expression = f"{test['call']}({', '.join(words)})"
            ast.parse(expression, mode="eval")
            return Case(test["result"], expression)
    except (CaseError, SyntaxError, ValueError, TypeError) as error:
        raise CaseError(f"test {number}, {str(test)[:200]}: {error}") from None
    raise CaseError(f"test {number}, {str(test)[:200]}: is none of {FORMS}")


def _assertion(text: str) -> Case:
    """`assert f(x) == value`, `assert f(x)`, `assert not f(x)`, `assert abs(f(x) - 1.5) < 1e-6`."""
    (node,) = ast.parse(text.strip()).body
    if not isinstance(node, ast.Assert):
        raise CaseError("is no assertion")
    test = node.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return _comparison(test)
    if isinstance(test, ast.Call) and ast.unparse(test.func) in ("math.isclose", "isclose"):
        given = {word.arg: ast.literal_eval(word.value) for word in test.keywords}
        expected = _constant(test.args[1])
        bound = max(given.get("abs_tol", 0.0), given.get("rel_tol", 1e-9) * abs(expected))
        return Case(expected, ast.unparse(test.args[0]), tolerance=bound)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return Case(False, f"bool({ast.unparse(test.operand)})")
    return Case(True, f"bool({ast.unparse(test)})")


def _comparison(test: ast.Compare) -> Case:
    left, (operation,), (right,) = test.left, test.ops, test.comparators
    if isinstance(operation, (ast.Eq, ast.Is)):
        for asked, known in ((left, right), (right, left)):
            try:
                return Case(_constant(known), ast.unparse(asked), strict=True)
            except ValueError:
                continue
        raise CaseError("one side of == must be a plain value, which stays outside of the sandbox")
    is_near = isinstance(operation, (ast.Lt, ast.LtE)) and isinstance(left, ast.Call)
    if is_near and ast.unparse(left.func) == "abs" and isinstance(left.args[0], ast.BinOp):
        difference = left.args[0]
        if isinstance(difference.op, ast.Sub):
            bound = float(_constant(right))
            return Case(_constant(difference.right), ast.unparse(difference.left), tolerance=bound)
    return Case(True, f"bool({ast.unparse(test)})")


def _constant(node: ast.expr) -> Any:
    """A literal, or one in set(...), sorted(...). Raises ValueError for what is none."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in _MAKERS:
            raise ValueError("no plain value")
        return _MAKERS[node.func.id](*(_constant(argument) for argument in node.args))
    return ast.literal_eval(node)


def _lines(text: str) -> list[str]:
    """Lines without what cannot be seen at their ends."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


_NUMBERS = {"bool": lambda text: text == "True", "int": int, "float": float, "complex": complex}
_SEQUENCES, _SETS = ("list", "tuple"), ("set", "frozenset")


def are_equal(expected: list, value: list, *, strict: bool, tolerance: tuple[float, float]) -> bool:
    """Equality of encoded values as in Python, but for the tolerance (relative, absolute)."""

    def same(ours: list, theirs: list) -> bool:
        kinds = ours[0], theirs[0]
        if kinds[0] in _NUMBERS and kinds[1] in _NUMBERS:
            return _same_number(ours, theirs, tolerance)
        if all(kind in _SEQUENCES for kind in kinds):
            if strict and kinds[0] != kinds[1] or len(ours[1]) != len(theirs[1]):
                return False
            return all(map(same, ours[1], theirs[1]))
        if all(kind in _SETS for kind in kinds):
            return len(ours[1]) == len(theirs[1]) and all(
                any(same(a, b) for b in theirs[1]) for a in ours[1]
            )
        if kinds == ("dict", "dict"):
            return len(ours[1]) == len(theirs[1]) and all(
                any(same(k, key) and same(v, item) for key, item in theirs[1]) for k, v in ours[1]
            )
        return ours == theirs

    return same(expected, value)


def _same_number(ours: list, theirs: list, tolerance: tuple[float, float]) -> bool:
    a, b = _NUMBERS[ours[0]](ours[1]), _NUMBERS[theirs[0]](theirs[1])
    if a == b:
        return True
    if "complex" in (ours[0], theirs[0]):
        return abs(a - b) <= max(tolerance[1], tolerance[0] * max(abs(a), abs(b)))
    if "float" not in (ours[0], theirs[0]) and not tolerance[1]:
        return False
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return math.isclose(a, b, rel_tol=tolerance[0], abs_tol=tolerance[1])

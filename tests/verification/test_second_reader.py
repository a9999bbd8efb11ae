"""The parser that measures progress, and that it is another than the rewards'."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from equilibrium_mcore.verification import second_reader
from equilibrium_mcore.verification.second_reader import is_right


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("42", 42, True),
        ("so 40 + 2 = 42", "42", True),
        ("42, no: 43", 42, False),
        ("#### 1,234", 1234, True),
        (r"\boxed{\frac{1}{2}} is it", "0.5", True),
        ("The answer is 7.\nOr 8?", 7, True),
        ("<answer>-3</answer>", -3, True),
        ("<answer>B</answer>", "B", True),
        ("the answer is b", "B", True),
        ("<answer>C</answer>", "B", False),
        ("", 0, False),
        ("1/0", 1, False),
        ("x = 5", "x+1", False),
    ],
)
def test_answers_are_read(text, truth, right):
    assert is_right(text, truth) is right


def test_trap_it_shares_no_code_with_the_rewards():
    """A policy that learned the faults of one parser must not be measured by them."""
    tree = ast.parse(Path(second_reader.__file__).read_text(encoding="utf-8"))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] + [getattr(node, "module", "") or ""])
    }
    assert not [name for name in imported if "equilibrium_mcore" in name]

"""docs/reference/traps.md: a row for each trap, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TABLE = REPOSITORY / "docs/reference/traps.md"
TRAPS = 38


def rows() -> dict[int, list[str]]:
    """The tests named for each trap, by its number."""
    found: dict[int, list[str]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| (\d+) \|.*\| (.*) \|$", line):
            assert int(match[1]) not in found
            found[int(match[1])] = re.findall(r"`([^`]+)`", match[2])
    return found


@cache
def functions_of(file: str) -> set[str]:
    """The functions of a test file that pytest collects."""
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_trap_has_a_test_whose_name_says_so():
    table = rows()
    assert sorted(table) == list(range(1, TRAPS + 1))
    for number, names in table.items():
        assert names, f"trap {number} names no test"
        for name in names:
            file, _, function = name.partition("::")
            assert function.startswith("test_trap_"), (
                f"trap {number}: {name} is not found by -k trap"
            )
            assert function in functions_of(file), f"trap {number}: there is no {name}"

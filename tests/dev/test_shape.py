"""The shape of the code: sizes, types and cycles are those that a small package was given."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.dev import shape

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path):
    """Writes a package's files and gives its folder."""

    def write(**files: str) -> Path:
        folder = tmp_path / "house"
        for name, text in files.items():
            path = folder / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            (path.parent / "__init__.py").touch()
        return folder

    return write


def cycles_of(folder: Path, *, deferred: bool) -> list[list[str]]:
    return shape.cycles(shape.import_graph(shape.read_modules(folder), deferred=deferred))


def test_a_cycle_at_module_level_is_found(package):
    folder = package(
        attic="from house import cellar\n",
        cellar="import house.stairs\n",
        stairs="from house.attic import roof\n",
        porch="from house import attic\n",
    )
    cycle = ["house.attic", "house.cellar", "house.stairs"]
    assert cycles_of(folder, deferred=False) == cycles_of(folder, deferred=True) == [cycle]


def test_a_cycle_through_a_function_is_one_with_deferred_imports(package):
    folder = package(
        attic="from . import cellar\n",
        cellar="def stairs() -> None:\n    from .attic import roof\n",
    )
    assert cycles_of(folder, deferred=False) == []
    assert cycles_of(folder, deferred=True) == [["house.attic", "house.cellar"]]


def test_relative_imports_of_packages_are_followed(package):
    folder = package(
        rooms__hall="from ..cellar import wine\n", cellar="from .rooms.hall import door\n"
    )
    assert cycles_of(folder, deferred=False) == [["house.cellar", "house.rooms.hall"]]


def test_imports_for_type_checking_alone_are_no_cycle(package):
    folder = package(
        attic="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house import cellar\n",
        cellar="from house import attic\n",
    )
    assert cycles_of(folder, deferred=True) == []


def test_the_package_has_no_cycle():
    folder = ROOT / "equilibrium_mcore"
    assert cycles_of(folder, deferred=True) == []
    assert len(shape.read_modules(folder)) > 200


def test_figures_are_counted(package):
    body = "    x = 1\n" * 3
    text = f"def typed() -> None:\n{body}\n\nclass Room:\n    def plain(self):\n        pass\n"
    found = {m.name: m.value for m in shape.measures(shape.read_modules(package(attic=text)))}
    assert found["files"] == 2  # with __init__.py, which is empty
    assert found["lines of a file, mean"] == 4.5 and found["lines of a file, 95 %"] == 9
    assert found["functions"] == 2 and found["lines of a function, median"] == 3
    assert found["lines of a function, longest"] == 4
    assert found["functions with a typed return, %"] == 50


def test_check_fails_for_what_is_worse_than_a_limit(package):
    def status(folder: Path) -> int:
        command = [sys.executable, ROOT / "tools" / "dev" / "shape.py", folder, "--check"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert ("WORSE" in done.stdout) == bool(done.returncode), done.stdout + done.stderr
        return done.returncode

    assert status(ROOT / "equilibrium_mcore") == 0
    assert status(package(attic="def untyped():\n    pass\n")) == 1
    folder = package(attic="from house import cellar\n", cellar="from house import attic\n")
    assert status(folder) == 1


def test_the_limits_are_those_of_the_design():
    limits = {m.name: m.limit for m in shape.measures(shape.read_modules(ROOT / "tools" / "dev"))}
    assert [limit for limit in limits.values() if limit is not None] == [161, 339, 8, 32, 96, 0, 0]


@pytest.mark.parametrize(
    ("values", "expected"), [([7], 7), (list(range(1, 101)), 95), (list(range(1, 21)), 19)]
)
def test_percentile(values, expected):
    assert shape.percentile_95(values) == expected

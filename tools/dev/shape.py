"""Print the shape of the package's code: file and function sizes, typed returns, import cycles.

Examples:
    python tools/dev/shape.py            # the table, and every cycle
    python tools/dev/shape.py --check    # status 1 when something is worse than its limit
Counted are the files of a package without its tests. A file's lines are all of its lines, a
function's those from `def` to its end, inner functions and methods included. An import counts
towards cycles wherever it stands, in a function too; one for type checking alone does not.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from equilibrium_mcore.files.paths import user_path

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, set[str]]


class Measure(NamedTuple):
    """One figure and its limit: the most that it may be, or with `at_least` the least."""

    name: str
    value: float
    limit: float | None = None
    at_least: bool = False

    @property
    def is_worse(self) -> bool:
        if self.limit is None:
            return False
        return self.value < self.limit if self.at_least else self.value > self.limit

    def row(self) -> str:
        limit = "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        return f"{self.name:<38} {self.value:>8.4g}   {limit:<8}{'WORSE' * self.is_worse}"


@dataclass(frozen=True)
class Module:
    """One file of the package, parsed."""

    name: str
    is_package: bool
    lines: int
    tree: ast.Module


def read_modules(package: Path) -> list[Module]:
    """Every module of the package in the folder `package`; raises FileNotFoundError without one."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        text = path.read_text(encoding="utf-8")
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Module(name, is_package, len(text.splitlines()), ast.parse(text)))
    if not found:
        raise FileNotFoundError(f"{package} holds no Python file: name a package's folder")
    return found


def functions(module: Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(module.tree) if isinstance(node, kinds)]


# -------------------------------------------------------------------------------------- imports


def import_graph(modules: Sequence[Module], *, deferred: bool) -> Graph:
    """Which module imports which; `deferred`: also inside functions, not at module level alone."""
    names = {module.name for module in modules}
    graph: Graph = {}
    for module in modules:
        meant = (t for node in _nodes(module.tree, deferred) for t in _targets(node, module))
        graph[module.name] = {_known(target, names) for target in meant} - {None, module.name}
    return graph


def _nodes(tree: ast.AST, deferred: bool) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, and without `deferred` those of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (inner for part in node.orelse for inner in (part, *_nodes(part, deferred)))
        elif deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _nodes(node, deferred)


def _targets(node: ast.AST, module: Module) -> Iterator[str]:
    """Full names that an import statement may mean: `from a import b` is a.b, or a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.name.split(".")
            kept = len(parts) - node.level + module.is_package
            base = ".".join([*parts[:kept], *([base] if base else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _known(target: str, names: set[str]) -> str | None:
    """The module of the package that `target` is, or is a name of."""
    return next((name for name in (target, target.rpartition(".")[0]) if name in names), None)


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            place = stack.index(name)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for name in graph:
        if name not in index:
            visit(name)
    return sorted(found)


# ------------------------------------------------------------------------------------- the table


def percentile_95(values: Sequence[int]) -> int:
    """The smallest value that 95 % of all do not exceed."""
    return sorted(values)[-(-95 * len(values) // 100) - 1]


def measures(modules: Sequence[Module]) -> list[Measure]:
    """The figures of a package, with the limits of `--check`."""
    files = [module.lines for module in modules]
    found = [node for module in modules for node in functions(module)]
    sizes = [node.end_lineno - node.lineno + 1 for node in found] or [0]
    typed = sum(node.returns is not None for node in found) / max(len(found), 1)
    level, everywhere = (len(cycles(import_graph(modules, deferred=d))) for d in (False, True))
    return [
        Measure("files", len(files)),
        Measure("lines of a file, mean", statistics.mean(files), 161),
        Measure("lines of a file, 95 %", percentile_95(files), 339),
        Measure("functions", len(found)),
        Measure("lines of a function, median", statistics.median(sizes), 8),
        Measure("lines of a function, 95 %", percentile_95(sizes), 32),
        Measure("lines of a function, longest", max(sizes)),
        Measure("functions with a typed return, %", 100 * typed, 96, at_least=True),
        Measure("import cycles at module level", level, 0),
        Measure("import cycles with deferred imports", everywhere, 0),
    ]


def main() -> int:
    """Parse the command line, print the table; with `--check` the status is the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = ROOT / "equilibrium_mcore"
    parser.add_argument("package", nargs="?", type=user_path, default=folder, help="its folder")
    parser.add_argument("--check", action="store_true", help="status 1 when a limit is passed")
    options = parser.parse_args()
    try:
        modules = read_modules(options.package.resolve())
    except (OSError, SyntaxError) as error:
        parser.error(str(error))
    found = measures(modules)
    print("\n".join(measure.row().rstrip() for measure in found))
    for cycle in cycles(import_graph(modules, deferred=True)):
        print(f"cycle: {' <-> '.join(cycle)}")
    return int(options.check and any(measure.is_worse for measure in found))


if __name__ == "__main__":
    raise SystemExit(main())

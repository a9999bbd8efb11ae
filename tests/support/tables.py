"""Tables of the source that are annotated as keyed, e.g. `TWINS: ByKind[...] = {...}`."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("equilibrium_mcore", "tools", "examples")


def tables_keyed(annotation: str) -> dict[str, dict[str, Any]]:
    """`FILE: NAME` -> the table, of all that are annotated `annotation[...]` in a module."""
    return {
        f"{path.relative_to(ROOT)}: {name}": getattr(_module(path), name)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in _annotated(path, annotation)
    }


def _annotated(path: Path, annotation: str) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=name),
                annotation=ast.Subscript(value=ast.Name(id=found)),
            ) if found == annotation:
                yield name


def _module(path: Path) -> Any:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

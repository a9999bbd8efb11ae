"""Real text from what every Python ships, so that the quickstart needs no network.

    python examples/stdlib_text.py --output-directory runs/quickstart/data

writes two JSONL sources, each line `{"text": ..., "source": ...}`:

    code.jsonl    the standard library's .py files, one document per file
    prose.jsonl   documentation: the docstrings of a module, one document per module, and the
                  topics of `pydoc`

The order is shuffled by a fixed seed, so that any prefix and any split is representative.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Not the library itself, or tables of data rather than code.
SKIPPED_DIRECTORIES = {
    "__pycache__", "__phello__", "config", "dist-packages", "encodings", "ensurepip", "idlelib",
    "idle_test", "lib-dynload", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
MAX_FILE_BYTES = 300_000
MIN_CHARACTERS = 64
SEED = 20260101

Document = tuple[str, str]  # source, text


def library_files(root: Path) -> Iterator[Path]:
    """The standard library's own .py files, sorted by path."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if name not in SKIPPED_DIRECTORIES and not name.startswith(SKIPPED_PREFIXES)
        )
        for name in sorted(names):
            path = Path(directory, name)
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                if path.stat().st_size <= MAX_FILE_BYTES:
                    yield path


def docstrings(source: str, module: str) -> str:
    """Every docstring of a module in order, each under the name that it documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    parts: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        text = ast.get_docstring(node, clean=True)
        if text:
            parts.append(f"{name}\n\n{text.strip()}")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return "\n\n".join(parts) + "\n" if parts else ""


def module_name(path: Path) -> str:
    """`json/decoder.py` -> `json.decoder`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def collect(root: Path) -> tuple[list[Document], list[Document]]:
    """The documents of code and of prose."""
    code: list[Document] = []
    prose: list[Document] = []
    for path in library_files(root):
        relative = path.relative_to(root)
        try:
            text = path.read_bytes().decode("utf-8")
            documentation = docstrings(text, module_name(relative))
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        code.append((f"stdlib/{relative.as_posix()}", text))
        prose.append((f"docstrings/{module_name(relative)}", documentation))
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        topics = {}
    prose.extend((f"topics/{name}", inspect.cleandoc(text) + "\n") for name, text in topics.items())
    return code, prose


def write_jsonl(documents: list[Document], path: Path, max_bytes: float) -> None:
    """Shuffle by the fixed seed, write aside, rename; print what was written."""
    documents = sorted(d for d in documents if len(d[1]) >= MIN_CHARACTERS)
    random.Random(SEED).shuffle(documents)
    aside = path.with_name(path.name + ".partial")
    written, count = 0, 0
    with aside.open("wb") as stream:
        for source, text in documents:
            line = json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"
            data = line.encode()
            if written + len(data) > max_bytes:
                continue
            stream.write(data)
            written += len(data)
            count += 1
    if not count:
        aside.unlink()
        raise SystemExit(
            f"{path}: no document fits into {max_bytes:,.0f} bytes; raise --max-megabytes, or "
            f"check that {sysconfig.get_paths()['stdlib']} holds the library's sources"
        )
    os.replace(aside, path)
    print(f"{path}: {count:,} documents, {written:,} bytes")


def main() -> None:
    """Parse the command line and write both sources."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-directory", type=Path, required=True)
    parser.add_argument(
        "--max-megabytes", type=float, default=float("inf"), help="limit for each file (10^6 bytes)"
    )
    arguments = parser.parse_args()
    arguments.output_directory.mkdir(parents=True, exist_ok=True)
    code, prose = collect(Path(sysconfig.get_paths()["stdlib"]))
    max_bytes = arguments.max_megabytes * 1e6
    write_jsonl(code, arguments.output_directory / "code.jsonl", max_bytes)
    write_jsonl(prose, arguments.output_directory / "prose.jsonl", max_bytes)


if __name__ == "__main__":
    main()

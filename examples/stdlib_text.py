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
import contextlib
import inspect
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.files.json_lines import json_line
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.files.replace import refuse_existing
from equilibrium_mcore.files.whole import whole_file

# Not the library itself, or tables of data rather than code.
SKIPPED_DIRECTORIES = {
    "__pycache__", "__phello__", "config", "dist-packages", "encodings", "ensurepip", "idlelib",
    "idle_test", "lib-dynload", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
MAX_FILE_BYTES = 300_000
MIN_CHARACTERS = 64
SEED = 20260101


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
            wanted = name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES)
            if wanted and path.stat().st_size <= MAX_FILE_BYTES:
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


def topics() -> dict[str, str]:
    """The texts of `pydoc`'s topics; some distributions ship them apart."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        return {}
    return {name: inspect.cleandoc(text) + "\n" for name, text in texts.items()}


class JsonlWriter:
    """Writes documents to the stream of what becomes `path`, until `max_bytes` are reached."""

    def __init__(self, path: Path, stream: BinaryIO, max_bytes: float) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.documents = self.bytes = 0
        self.full = False
        self._stream = stream

    def add(self, source: str, text: str) -> None:
        """Append a document; the one that does not fit is the end."""
        if self.full or len(text) < MIN_CHARACTERS:
            return
        line = json_line({"text": text, "source": source})
        self.full = self.bytes + len(line) > self.max_bytes
        if not self.full:
            self._stream.write(line)
            self.documents += 1
            self.bytes += len(line)

    def finish(self) -> None:
        """Print what was written. Raises ValueError where nothing was."""
        if not self.documents:
            raise ValueError(
                f"{self.path}: no document fits into {self.max_bytes:,.0f} bytes; raise "
                f"--max-megabytes, or check that {sysconfig.get_paths()['stdlib']} holds the "
                f"library's sources"
            )
        print(f"{self.path}: {self.documents:,} documents, {self.bytes:,} bytes")


def write_sources(root: Path, code: JsonlWriter, prose: JsonlWriter) -> None:
    """Go through files and topics in shuffled order until both outputs are full or all is read."""
    help_texts = topics()
    units: list[Path | str] = [*library_files(root), *sorted(help_texts)]
    random.Random(SEED).shuffle(units)
    for unit in units:
        if code.full and prose.full:
            break
        if isinstance(unit, str):
            prose.add(f"topics/{unit}", help_texts[unit])
            continue
        relative = unit.relative_to(root)
        try:
            text = unit.read_bytes().decode("utf-8")
            documentation = "" if prose.full else docstrings(text, module_name(relative))
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        code.add(f"stdlib/{relative.as_posix()}", text)
        prose.add(f"docstrings/{module_name(relative)}", documentation)


def is_text(path: Path) -> bool:
    """Whether this script wrote the file, by its first line."""
    with path.open("rb") as stream:
        return stream.readline().startswith(b'{"text": ')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the files go, and how large they become."""
    parser.add_argument("--output-directory", type=user_path, required=True)
    parser.add_argument(
        "--max-megabytes", type=float, default=float("inf"), help="limit for each file (10^6 bytes)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what it wrote before")


def run(options: argparse.Namespace) -> None:
    """Write both sources."""
    outputs = [options.output_directory / name for name in ("code.jsonl", "prose.jsonl")]
    refuse_existing(
        outputs,
        overwrite=options.overwrite,
        is_ours=is_text,
        what="text of this script",
        option="--output-directory",
    )
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(whole_file(path, "wb")) for path in outputs]
        max_bytes = options.max_megabytes * 1e6
        code, prose = map(JsonlWriter, outputs, streams, [max_bytes] * 2)
        write_sources(Path(sysconfig.get_paths()["stdlib"]), code, prose)
        code.finish()
        prose.finish()


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

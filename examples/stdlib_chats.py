"""Conversations made from the documentation that every Python ships, so that no network is needed.

    python examples/stdlib_chats.py --output-directory runs/chat/data

writes `train.jsonl` and `validation.jsonl`, each line `{"messages": [{"role", "content"}, ...]}`.
A function's or class's docstring becomes a question about what it does, at times followed by how it
is called and where it lives; a third of the conversations begin with a system message. One name in
fifty is held out, by a hash of it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stdlib_text import library_files, module_name

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.files.json_lines import json_line
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.files.replace import refuse_existing
from equilibrium_mcore.files.whole import whole_file

SEED = 20260102
HELD_OUT = 50  # one name in so many
SYSTEM = "You answer questions about Python's standard library."
MAX_ANSWER = 240  # characters; longer first paragraphs are cut after a sentence
_QUESTIONS = ("What does {name} do?", "Explain {name}.", "What is {name} for?")
_KINDS = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}


class Item(NamedTuple):
    """A documented name."""

    module: str
    name: str
    kind: str
    says: str
    signature: str | None


def items(source: str, module: str) -> Iterator[Item]:
    """The public functions and classes of a module that say what they do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    for node in tree.body:
        kind = _KINDS.get(type(node))
        if kind is None or node.name.startswith("_"):
            continue
        says = _first_paragraph(ast.get_docstring(node, clean=True) or "")
        if says:
            called = None if kind == "class" else f"{node.name}({ast.unparse(node.args)})"
            yield Item(module, node.name, kind, says, called)


def conversation(item: Item, draw: random.Random) -> list[dict[str, str]]:
    """Questions and answers about an item."""
    messages = [_message("system", SYSTEM)] if draw.random() < 1 / 3 else []
    name = f"{item.module}.{item.name}"
    messages += _asked(draw.choice(_QUESTIONS).format(name=name), item.says)
    if item.signature is not None and draw.random() < 0.5:
        messages += _asked("How is it called?", f"`{item.signature}`")
    if draw.random() < 0.3:
        where = f"It is a {item.kind} of the module {item.module}."
        messages += _asked("Where is it?", where)
    return messages


def write_conversations(root: Path, folder: Path) -> dict[str, int]:
    """Both files, in a seeded order; how many conversations each has."""
    found = sorted(set(_all_items(root)))
    draw = random.Random(SEED)
    draw.shuffle(found)
    parts: dict[str, list[Item]] = {"train": [], "validation": []}
    for item in found:
        parts["validation" if _is_held_out(item) else "train"].append(item)
    for part, chosen in parts.items():
        with whole_file(folder / f"{part}.jsonl", "wb") as stream:
            for item in chosen:
                stream.write(json_line({"messages": conversation(item, draw)}))
    return {part: len(chosen) for part, chosen in parts.items()}


def _all_items(root: Path) -> Iterator[Item]:
    for path in library_files(root):
        relative = path.relative_to(root)
        try:
            yield from items(path.read_bytes().decode("utf-8"), module_name(relative))
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue


def _first_paragraph(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    if len(paragraph) > MAX_ANSWER:
        ends = [match.end() for match in re.finditer(r"[.!?](?= )", paragraph[:MAX_ANSWER])]
        paragraph = paragraph[: ends[-1]] if ends else ""
    return paragraph


def _is_held_out(item: Item) -> bool:
    digest = hashlib.sha256(f"{item.module}.{item.name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT == 0


def _asked(question: str, answer: str) -> list[dict[str, str]]:
    return [_message("user", question), _message("assistant", answer)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def is_conversations(path: Path) -> bool:
    """Whether this script wrote the file, by its first line."""
    with path.open("rb") as stream:
        return stream.readline().startswith(b'{"messages": ')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the files go."""
    parser.add_argument("--output-directory", type=user_path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace what it wrote before")


def run(options: argparse.Namespace) -> None:
    """Write both files."""
    folder = options.output_directory
    refuse_existing(
        [folder / "train.jsonl", folder / "validation.jsonl"],
        overwrite=options.overwrite,
        is_ours=is_conversations,
        what="conversations of this script",
        option="--output-directory",
    )
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in write_conversations(Path(sysconfig.get_paths()["stdlib"]), folder).items():
        print(f"{folder / part}.jsonl: {count:,} conversations")


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

"""Only `files/` renames and syncs; what is not written whole says why, in its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("equilibrium_mcore", "tools", "examples")
FILES = "equilibrium_mcore/files/"
REASON = "not whole:"
RENAMES = {"os.replace", "os.rename", "os.renames", "os.fsync", "shutil.move"}
RENAMED = (
    "this is for equilibrium_mcore/files/whole.py: use write_whole, whole_file, whole_folder, or "
    "sync_stream and rename_durably for what keeps a temporary name of its own"
)
WRITTEN = (
    "a kill would leave half a file: use write_whole, whole_file or JsonLinesLog of "
    f"equilibrium_mcore/files, or say in a comment there, `# {REASON} ...`, why it may be half"
)


def offences(source: str) -> Iterator[str]:
    """`line: what is wrong` for each call that may leave half a file, or renames by itself."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        if call in RENAMES or _renames_a_path(node):
            yield f"{node.lineno}: {call}: {RENAMED}"
        elif _writes(node):
            around = lines[max(0, node.lineno - 2) : node.end_lineno]
            if not any(REASON in line.partition("#")[2].lower() for line in around):
                yield f"{node.lineno}: {call}: {WRITTEN}"


def _renames_a_path(call: ast.Call) -> bool:
    """`path.rename(x)` and `path.replace(x)`; text and dataclasses are replaced by two."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return name == "rename" or name == "replace" and len(call.args) == 1 and not call.keywords


def _writes(call: ast.Call) -> bool:
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", "")
    if name in ("write_text", "write_bytes"):
        return True
    if name != "open" or ast.unparse(call.func) == "os.open":
        return False
    modes = [k.value for k in call.keywords if k.arg == "mode"] or call.args[
        0 if is_method else 1 :
    ]
    mode = modes[0] if modes else ast.Constant("r")
    return not isinstance(mode, ast.Constant) or bool(set("wxa+") & set(str(mode.value)))


def test_what_is_written_is_whole_or_says_why_not():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 200
    found = [
        f"{path.relative_to(ROOT)}:{offence}"
        for path in paths
        if not str(path.relative_to(ROOT)).startswith(FILES)
        for offence in offences(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "os.replace(a, b)",
        "path.rename(b)",
        "path.replace(b)",
        "os.fsync(stream.fileno())",
        "shutil.move(a, b)",
        "path.write_text(text)",
        'open(path, "w")',
        'path.open("ab", buffering=0)',
        'path.open(mode="x")',
        "path.open(mode)",
        'path.open("r+b")  # whole enough',
    ],
)
def test_each_way_to_leave_half_a_file_is_found(line):
    assert len(list(offences(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        'text.replace("a", "b")',
        "dataclasses.replace(plan, steps=1)",
        'path.open("rb")',
        "path.open()",
        "open(path)",
        "os.open(path, os.O_RDONLY)",
        'path.open("w")  # not whole: a process writes to it',
        '# Not whole: appended to.\npath.open("ab")',
    ],
)
def test_reading_and_reasons_pass(line):
    assert not list(offences(line))

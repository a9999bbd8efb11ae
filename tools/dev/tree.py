"""Write docs/tree.md: every file of the project with the first sentence that it says of itself.

Examples:
    python tools/dev/tree.py            # writes docs/tree.md
    python tools/dev/tree.py --check    # says whether it is up to date; a test runs this
A Python file is described by its docstring, a script or a YAML file by its first comment, a
document by its first sentence, JSONL by `about` in its first row. A file that says nothing is an
error: say there what it is.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.files.whole import write_whole

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "docs" / "tree.md"
FOLDERS = ("equilibrium_mcore", "tools", "examples", "configs", "slurm", "docs", "tests")
BY_FOLDER = "tests"  # its folders are described, not its files
PICTURES = (".png", ".svg")
WIDTH = 96
HEAD = """# Every file

Written by `python tools/dev/tree.py` from the first sentence of each file; a test compares. What
the packages are for, and how they depend on each other: [architecture.md](design/architecture.md).
"""


def project_files() -> list[str]:
    """Paths that git tracks, or would; all files where this is no git checkout."""
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others"]
    command = [*git, "--exclude-standard", "--", *FOLDERS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return sorted({name for name in listed.stdout.splitlines() if (ROOT / name).is_file()})
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(str(p.relative_to(ROOT)) for p in found if p.suffix != ".pyc")


def said_of(path: Path) -> str:
    """The first sentence that a file says of itself; raises ValueError where it says none."""
    text = "" if path.suffix in PICTURES else path.read_text(encoding="utf-8")
    if path.suffix in PICTURES:
        said = "picture"
    elif path.suffix == ".ipynb":
        said = "".join(json.loads(text)["cells"][0]["source"])
    elif path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".md":
        said = text
    elif path.suffix == ".jsonl":
        said = json.loads(text.splitlines()[0]).get("about", "")
    else:
        comments = re.match(r"(?:#!.*\n)?((?:# .*\n|#\n)+)", text)
        said = re.sub(r"^# ?", "", comments[1], flags=re.M) if comments else ""
    paragraphs = [" ".join(part.split()) for part in said.split("\n\n")]
    plain = [part for part in paragraphs if part and not part.startswith(("#", "```", "|", "["))]
    if not plain:
        raise ValueError(f"{path} does not say what it is: begin it with a sentence")
    return _first_sentence(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", plain[0]))


def _first_sentence(text: str) -> str:
    sentence = re.split(r"(?<=[^.\s][.?!])\s+(?=[A-Z`\"])", text)[0].rstrip(".:")
    return sentence if len(sentence) <= WIDTH else sentence[:WIDTH].rsplit(" ", 1)[0] + " ..."


def tree_text() -> str:
    """The whole document. Raises ValueError with every file that does not say what it is."""
    lines, problems, folder = [], [], ""
    for name in sorted(project_files(), key=_files_first):
        path = Path(name)
        if path.parts[0] == BY_FOLDER and path.name != "__init__.py" and len(path.parts) > 2:
            continue
        if str(path.parent) != folder:
            folder = str(path.parent)
            lines += ["", f"## {folder}", ""]
        try:
            said = said_of(ROOT / path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if path.name == "__init__.py":
            lines += [f"{said}.", ""]
        else:
            lines.append(f"- [{path.name}](../{name}): {said}")
    if problems:
        raise ValueError("\n".join(problems))
    return re.sub(r"\n{3,}", "\n\n", HEAD + "\n".join(lines)) + "\n"


def _files_first(name: str) -> tuple[tuple[str, ...], bool, str]:
    path = Path(name)
    return path.parent.parts, path.name != "__init__.py", path.name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether it is written."""
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when it differs")


def run(options: argparse.Namespace) -> int:
    """Write the tree, or compare it."""
    text = tree_text()
    if not options.check:
        write_whole(TREE, text)
    elif not TREE.is_file() or TREE.read_text(encoding="utf-8") != text:
        print("error: docs/tree.md is not up to date: python tools/dev/tree.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

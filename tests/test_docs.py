"""The documents speak of what is there: files, links, commands, options, settings, counts."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from equilibrium_mcore.config.experiment_words import WORDS
from equilibrium_mcore.config.load import run_from_mapping, usage
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.yaml_io import parse_yaml
from tools.dev.tree import said_of, tree_text

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TREE = ROOT / "docs" / "tree.md"  # generated
GUIDES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path != TREE)
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *GUIDES]
# Those whose every `section.key` is a setting; other documents name tensors and metrics too.
OF_SETTINGS = [README, ROOT / "CONTRIBUTING.md", ROOT / "docs" / "checkpoints.md"]
MAINS = ("-m equilibrium_mcore.train", "-m equilibrium_mcore.pretrain")
JOBS = ("slurm/train.sh", "slurm/pretrain_3b.sh")
STARTERS = ("tools/train.py", "tools/resume_training.py")  # they take settings, too
LISTED_BY_FILE = ("equilibrium_mcore", "tools", "examples", "configs", "slurm", "docs")


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def fenced(document: Path, *languages: str) -> list[str]:
    """The text of the document's fenced blocks of these languages; "" for a block without one."""
    found, inside = [], None
    for line in read(document).splitlines():
        if not line.startswith("```"):
            if inside is not None:
                inside[1].append(line)
        elif inside is None:
            inside = (line.removeprefix("```"), [])
        else:
            found.append(inside)
            inside = None
    return ["\n".join(lines) for language, lines in found if language in languages]


def inline_code(document: Path) -> list[str]:
    """What stands between backticks outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", read(document), flags=re.M | re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


# ---------------------------------------------------------------------------------------- the tree


def test_the_tree_is_up_to_date():
    """docs/tree.md is what the files say of themselves: python tools/dev/tree.py writes it."""
    assert read(TREE) == tree_text()


def test_a_file_that_does_not_say_what_it_is_is_an_error(tmp_path):
    silent = tmp_path / "silent.py"
    silent.write_text("x = 1\n")
    with pytest.raises(ValueError, match="does not say what it is"):
        said_of(silent)
    silent.write_text('"""Doubles a number. Slowly."""\n')
    assert said_of(silent) == "Doubles a number"


# ------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = document.parent / path if path else document
        assert place.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(place), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_the_text_exist(document):
    top = "|".join((*LISTED_BY_FILE, "tests"))
    for code in inline_code(document):
        if re.fullmatch(rf"({top})/[\w./\-]*", code) and not re.search(r"mine|my_", code):
            assert (ROOT / code).exists(), f"{document.name} speaks of {code}"


# ---------------------------------------------------------------------------------------- commands


def commands(document: Path) -> list[list[str]]:
    """Command lines in the document's shell blocks, indented lines and inline code, as words."""
    lines: list[str] = []
    for block in fenced(document, "bash", "console", "sh", ""):
        lines += block.replace("\\\n", " ").splitlines()
    indented = [line[4:] for line in read(document).splitlines() if line.startswith("    ")]
    start = re.compile(r"([A-Z_]+=\S+ )*(bash|python|sbatch|torchrun) ")
    lines += filter(start.match, [*indented, *inline_code(document)])
    found = []
    for line in lines:
        for part in re.split(r"&&|;|\|", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # no shell
                continue
            if words:
                found.append(words)
    return found


def named_script(words: list[str]) -> str | None:
    """The script or module of ours that a command runs: a path, or `-m module`; else None."""
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m" and word.startswith("equilibrium_mcore."):
            return f"-m {word}"
        if re.fullmatch(r"[\w./\-]+\.(py|sh)", word) and not word.startswith("/"):
            return word
    return None


ALL_COMMANDS = [(d, words) for d in DOCUMENTS for words in commands(d) if named_script(words)]


def options_of(words: list[str], script: str) -> list[str]:
    """The --options that stand behind the script."""
    rest = words[words.index(script.removeprefix("-m ")) + 1 :]
    return [word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)]


def test_documents_have_commands():
    scripts = {named_script(words) for _, words in ALL_COMMANDS}
    assert {"examples/quickstart.sh", "tests/run.sh", *JOBS} <= scripts
    assert set(MAINS) <= scripts


def test_commands_name_files_that_exist():
    for document, words in ALL_COMMANDS:
        script = named_script(words)
        path = script
        if script.startswith("-m "):
            path = script.removeprefix("-m ").replace(".", "/") + ".py"
        assert (ROOT / path).is_file(), f"{document.name}: {' '.join(words)}"


def help_text(script: str) -> str:
    """What `script --help` prints. Python runs in this process, where torch is imported once."""
    if script in MAINS:
        return usage(f"python {script}")
    path = str(ROOT / script)
    if script.endswith(".sh"):
        return subprocess.run(["bash", path, "--help"], capture_output=True, text=True).stdout
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as leaving,
    ):
        patch.setattr(sys, "argv", [path, "--help"])
        patch.setattr(os, "environ", os.environ.copy())
        runpy.run_path(path, run_name="__main__")
    assert not leaving.value.code, f"{script} --help failed"
    return printed.getvalue()


def test_options_in_commands_are_in_the_help():
    wanted: dict[str, list[tuple[str, str]]] = {}
    for document, words in ALL_COMMANDS:
        script = named_script(words)
        # These hand their options on, to pytest and to the run.
        if script in ("tests/run.sh", *JOBS, "tests/slurm/local_cluster.sh"):
            continue
        for option in options_of(words, script):
            wanted.setdefault(script, []).append((option, document.name))
    assert {"tools/preprocess_data.py", "tools/convert_checkpoint.py"} <= wanted.keys()
    for script, options in wanted.items():
        text = help_text(script)
        for option, document in options:
            known = re.search(rf"{option}(?![\w-])", text)
            assert known, f"{document}: {script} has no option {option}"


def test_variables_of_the_slurm_scripts_are_theirs():
    script = read(ROOT / "slurm" / "pretrain_3b.sh") + read(ROOT / "slurm" / "train.sh")
    for line in re.findall(r"^\| (`[A-Z_`, ]+`) \|", read(README), re.M):
        for variable in re.findall(r"[A-Z_]+", line):
            read_there = re.search(rf"\$\{{{variable}:[-+]", script)
            assert read_there, f"the scripts in slurm/ do not read {variable}"


# ---------------------------------------------------------------------------------------- settings


def is_setting(key: str, section: Any = RunConfig) -> bool:
    """Whether `a.b.0.c` names a setting or a section of a run."""
    if not key:
        return True
    if isinstance(section, types.UnionType) or get_origin(section) is types.UnionType:
        return any(is_setting(key, part) for part in get_args(section))
    head, _, rest = key.partition(".")
    if isinstance(section, type) and issubclass(section, BaseModel):
        return head in section.model_fields and is_setting(
            rest, section.model_fields[head].annotation
        )
    if get_origin(section) is list:
        return head.isdecimal() and is_setting(rest, get_args(section)[0])
    return get_origin(section) is dict and not rest


def test_what_is_a_setting():
    for key in ("training.steps", "model.moe.top_k", "data.sources.0.weight", "model"):
        assert is_setting(key), key
    for key in ("training.step", "model.moe.steps", "data.sources.weight", "train.steps"):
        assert not is_setting(key), key


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_in_commands_exist(document):
    for words in commands(document):
        script = named_script(words)
        if script in (*MAINS, *JOBS, *STARTERS):
            first = words.index(script.removeprefix("-m ")) + 1
            for word in words[first:]:
                key, equals, _ = word.partition("=")
                if equals and not key.startswith("-") and key != "key":
                    known = is_setting(key) or key in WORDS
                    assert known, f"{document.name}: {' '.join(words)}: {key}"


@pytest.mark.parametrize("document", OF_SETTINGS, ids=lambda path: path.name)
def test_settings_in_the_text_exist(document):
    sections = "|".join(RunConfig.model_fields)
    for code in inline_code(document):
        found = re.fullmatch(rf"((?:{sections})\.[a-z_0-9.]+)(?:[=:].*)?", code)
        if found and not re.search(r"\.(yaml|py|jsonl)$", found[1]):
            assert is_setting(found[1]), f"{document.name} speaks of {code}"


def test_the_run_of_the_readme_is_a_run():
    data, run = (parse_yaml(block, source="README") for block in fenced(README, "yaml"))
    assert run_from_mapping({**run, "data": data}, folder=ROOT / "configs" / "runs").name == "mine"


def test_counts_are_those_of_the_models_document():
    rows = r"^\| (`\w[\w.]*`) \| ([^|]+) \| ([\d,]+) \| ([\d,]+) \|"
    in_readme = re.findall(rows, read(README), re.M)
    assert len(in_readme) == len(list((ROOT / "configs" / "models").glob("*.yaml")))
    assert in_readme == re.findall(rows, read(ROOT / "docs" / "models.md"), re.M)

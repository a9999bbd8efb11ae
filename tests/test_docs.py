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
import tomllib
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from equilibrium_mcore.config.experiment_keys import KEYS
from equilibrium_mcore.config.load import run_from_mapping, usage
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.stages import STAGES
from equilibrium_mcore.config.yaml_io import parse_yaml
from tests.support.notebooks import as_markdown
from tools.dev.tree import said_of, tree_text

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
INDEX, TREE = DOCS / "README.md", DOCS / "tree.md"  # the tree is generated
PAGES = sorted(path for path in DOCS.rglob("*.md") if path != TREE)
AT_THE_TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))
DOCUMENTS = [*AT_THE_TOP, *PAGES, *NOTEBOOKS]
# Those whose every `section.key` is a setting; other documents name tensors and metrics too.
OF_SETTINGS = [
    *AT_THE_TOP,
    *(DOCS / "guides").glob("*_GUIDE.md"),
    *(DOCS / "reference" / f"{name}.md" for name in ("checkpoints", "data", "limits")),
    *(
        DOCS / "guides" / f"{name}.md"
        for name in ("experiments", "fine_tuning", "recipes", "slurm")
    ),
]
MAINS = ("-m equilibrium_mcore.train", "-m equilibrium_mcore.pretrain")
JOBS = ("slurm/train.sh", "slurm/pretrain_3b.sh")
STARTERS = ("tools/train.py", "tools/resume_training.py")  # they take settings, too
LISTED_BY_FILE = ("equilibrium_mcore", "tools", "examples", "configs", "slurm", "docs")


def read(document: Path) -> str:
    """A document's text; a notebook's as Markdown."""
    if document.suffix == ".ipynb":
        return as_markdown(document)
    return document.read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    """Where a document is, for the names of tests and for messages."""
    return str(document.relative_to(ROOT))


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = document.parent / path if path else document
        assert place.exists(), f"{name_of(document)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(place), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{name_of(document)} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_in_the_text_exist(document):
    top = "|".join((*LISTED_BY_FILE, "tests"))
    for code in inline_code(document):
        if re.fullmatch(rf"({top})/[\w./\-]*", code) and not re.search(r"mine|my_", code):
            assert (ROOT / code).exists(), f"{name_of(document)} speaks of {code}"


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
    assert any(document in NOTEBOOKS for document, _ in ALL_COMMANDS)
    assert set(MAINS) <= scripts


def test_commands_name_files_that_exist():
    for document, words in ALL_COMMANDS:
        script = named_script(words)
        path = script
        if script.startswith("-m "):
            path = script.removeprefix("-m ").replace(".", "/") + ".py"
        assert (ROOT / path).is_file(), f"{name_of(document)}: {' '.join(words)}"


def help_text(script: str) -> str:
    """What `script --help` prints. Python runs in this process, where torch is imported once."""
    if script in MAINS:
        return usage(f"python {script}")
    path = str(ROOT / script)
    if script.startswith("-m "):
        command = [sys.executable, *script.split(), "--help"]
        return subprocess.run(command, capture_output=True, text=True).stdout
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
            wanted.setdefault(script, []).append((option, name_of(document)))
    assert {"tools/preprocess_data.py", "tools/convert_checkpoint.py"} <= wanted.keys()
    for script, options in wanted.items():
        text = help_text(script)
        for option, document in options:
            known = re.search(rf"{option}(?![\w-])", text)
            assert known, f"{document}: {script} has no option {option}"


def test_variables_of_the_slurm_scripts_are_theirs():
    script = read(ROOT / "slurm" / "pretrain_3b.sh") + read(ROOT / "slurm" / "train.sh")
    lines = re.findall(r"^\| (`[A-Z_`, ]+`) \|", read(DOCS / "guides" / "slurm.md"), re.M)
    assert any("RUN_CONFIG" in line for line in lines)
    for line in lines:
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_settings_in_commands_exist(document):
    for words in commands(document):
        script = named_script(words)
        if script in (*MAINS, *JOBS, *STARTERS):
            first = words.index(script.removeprefix("-m ")) + 1
            for word in words[first:]:
                key, equals, _ = word.partition("=")
                if equals and not key.startswith("-") and key != "key":
                    known = is_setting(key) or key in KEYS
                    assert known, f"{name_of(document)}: {' '.join(words)}: {key}"


@pytest.mark.parametrize("document", OF_SETTINGS, ids=name_of)
def test_settings_in_the_text_exist(document):
    sections = "|".join(RunConfig.model_fields)
    for code in inline_code(document):
        found = re.fullmatch(rf"((?:{sections})\.[a-z_0-9.]+)(?:[=:].*)?", code)
        if found and not re.search(r"\.(yaml|py|jsonl)$", found[1]):
            known = is_setting(found[1]) or found[1] in KEYS
            assert known, f"{name_of(document)} speaks of {code}"


def yaml_blocks(document: Path) -> list[dict[str, Any]]:
    """The mappings in a document's YAML blocks; those that leave things out with `...` excepted."""
    blocks = [block for block in fenced(document, "yaml") if "  ..." not in block]
    return [parse_yaml(block, source=name_of(document)) for block in blocks]


@pytest.mark.parametrize("document", [README, DOCS / "guides" / "TRAINING_GUIDE.md"], ids=name_of)
def test_the_run_of_a_document_is_a_run(document):
    """On the blend of the README."""
    (run,) = (block for block in yaml_blocks(document) if "training" in block)
    (data,) = (block for block in yaml_blocks(README) if "sources" in block)
    assert run_from_mapping({**run, "data": data}, folder=ROOT / "configs" / "runs").name == "mine"


def test_the_models_of_the_guide_are_models():
    """Both fit into the quickstart's run: with `from:`, and as a file of its own."""
    quickstart = parse_yaml(
        read(ROOT / "configs" / "runs" / "quickstart.yaml"), source="quickstart"
    )
    changed, own = yaml_blocks(DOCS / "guides" / "MODEL_ARCHITECTURE_GUIDE.md")
    for model in (changed["model"], own):
        run = {**quickstart, "model": model, "parallelism": {"world_size": 1}}
        config = run_from_mapping(run, folder=ROOT / "configs" / "runs")
        assert config.model.name == model["name"]


def test_the_models_document_has_every_model():
    rows = re.findall(
        r"^\| `(\w[\w.]*)` \| [^|]+ \| [\d,]+ \|", read(DOCS / "reference" / "models.md"), re.M
    )
    assert sorted(rows) == sorted(
        path.stem for path in (ROOT / "configs" / "models").glob("*.yaml")
    )


# ------------------------------------------------------------------------------ the front of house


@pytest.mark.parametrize(
    "document",
    [README, DOCS / "guides/experiments.md", DOCS / "reference/mixtures.md"],
    ids=name_of,
)
def test_lists_of_stages_have_every_stage(document):
    missing = set(STAGES) - {word for code in inline_code(document) for word in code.split()}
    assert not missing, f"{name_of(document)} does not name the stages {sorted(missing)}"


def test_the_readme_is_one_page():
    assert len(read(README).splitlines()) <= 180


def test_the_index_names_every_page():
    linked = {
        (INDEX.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", read(INDEX))
    }
    assert set(PAGES) | {TREE} <= linked | {INDEX}


def test_the_citation_is_of_this_version():
    """The keys that CFF 1.2.0 requires, and the version and license of pyproject.toml."""
    citation = parse_yaml(read(ROOT / "CITATION.cff"), source="CITATION.cff")
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert citation["authors"] == [{"name": "equilibrium_mcore contributors"}]
    assert citation["license"] == "Apache-2.0"
    assert str(citation["version"]) == project["version"]
    assert f"[{project['version']}]" in read(ROOT / "CHANGELOG.md")

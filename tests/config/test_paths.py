"""`~` and `$VARS` mean the same in every path that a user names, in configs and options."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.filters import FILTER_CLASSES
from equilibrium_mcore.config.load import load_run, save_config
from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.paths import expand_path

ROOT = Path(__file__).parents[2]
RUN = ROOT / "configs/runs/quickstart.yaml"
TYPES = ("user_path", "report_path")
NAMES_A_PATH = ("input", "output", "folder", "prefix", "directory", "checkpoint", "tokenizer-model")


@pytest.fixture
def scratch(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path / "scratch"


def bare_paths(annotation: Any, metadata: tuple = ()) -> int:
    """How many paths in an annotation are read without being expanded."""
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        return bare_paths(inner, (*metadata, *rest))
    if annotation is Path:
        return not any(getattr(item, "func", None) is expand_path for item in metadata)
    return sum(bare_paths(part) for part in get_args(annotation))


def sections(kind: type[BaseModel]) -> set[type[BaseModel]]:
    found, waiting = set(), [kind]
    while waiting:
        part = waiting.pop()
        if isinstance(part, type) and issubclass(part, BaseModel) and part not in found:
            found.add(part)
            waiting += [field.annotation for field in part.model_fields.values()]
        waiting += get_args(part)
    return found


def test_no_setting_is_a_bare_path():
    kinds = sections(RunConfig) | sections(MixtureConfig) | set(FILTER_CLASSES.values())
    bare = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, field in kind.model_fields.items()
        if bare_paths(field.annotation, tuple(field.metadata))
    ]
    assert len(kinds) > 20 and not bare


@pytest.mark.parametrize("folder", ["tools", "examples"])
def test_no_option_is_a_bare_path(folder):
    """Every option that is a path, by its type or its name, has the type that expands."""
    checked, bare = 0, []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            called = getattr(call.func, "attr", getattr(call.func, "id", ""))
            name = getattr(call.args[0], "value", None)
            if called not in ("add", "add_argument") or not isinstance(name, str):
                continue
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            is_path = name.strip("-").endswith(NAMES_A_PATH) or given.get("metavar") == "'OUT'"
            if given.get("type") == "Path" or (is_path and given.get("type") not in TYPES):
                bare.append(f"{file.name} {name}")
            checked += is_path
    assert checked and not bare


def test_a_run_reads_every_kind_of_path(scratch):
    scratch.mkdir()
    (scratch / "mine.yaml").write_text((ROOT / "configs/data/quickstart.yaml").read_text())
    (scratch / "run.yaml").write_text(RUN.read_text())
    config = load_run(
        "$SCRATCH/run.yaml",
        [
            "model=equilibrium_tiny",
            "output_directory=~/runs/x",
            "data={from: $SCRATCH/mine.yaml}",
            "data.tokenizer.model=${SCRATCH}/t.model",
            "data.sources.0.prefix=~/data/code",
            "checkpoint.initial_weights=$SCRATCH/weights",
        ],
    )
    home = scratch.parent / "home"
    assert config.output_directory == home / "runs/x"
    assert config.data.tokenizer.model == scratch / "t.model"
    assert config.data.sources[0].prefix == home / "data/code"
    assert config.checkpoint.initial_weights == scratch / "weights"
    # The saved copy holds what was meant, so it is the same elsewhere and later.
    save_config(config, scratch / "config.yaml")
    assert "$" not in (scratch / "config.yaml").read_text()
    assert load_run(scratch / "config.yaml") == config


def test_a_mixture_and_its_filters_read_them_too(scratch):
    scratch.mkdir()
    (scratch / "mixture.yaml").write_text(
        "metadata: {phase: pretrain, total_tokens: 1000}\n"
        "datasets:\n"
        "  - {name: a, source: $SCRATCH/a.jsonl, mix_ratio: 0.5}\n"
        "  - {name: b, source: ./b.jsonl, mix_ratio: 0.5,\n"
        "     filters: [{type: decontamination, references: [~/mmlu.jsonl]}]}\n"
    )
    first, second = load_mixture("$SCRATCH/mixture").datasets
    assert first.source == str(scratch / "a.jsonl")
    assert second.source == "./b.jsonl"  # letter for letter: a dot says that it is no Hub name
    assert second.filters[0].references == [scratch.parent / "home/mmlu.jsonl"]
    (local, _) = load_mixture("$SCRATCH/mixture", local=["a=~/a.jsonl"]).datasets
    assert local.source == str(scratch.parent / "home/a.jsonl")
    with pytest.raises(ConfigError, match=r"source='\$NOWHERE/a': the environment variable"):
        load_mixture("$SCRATCH/mixture", local=["a=$NOWHERE/a"])
    with pytest.raises(ConfigError, match=r"mixture \$NOWHERE/m: the environment variable NOWHERE"):
        load_mixture("$NOWHERE/m")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("output_directory=$NOWHERE/x", r"output_directory='\$NOWHERE/x'"),
        ("data.tokenizer.model=${NOWHERE}/x", r"data\.tokenizer\.model='\$\{NOWHERE\}/x'"),
        ("model=$NOWHERE/m.yaml", r"model=\$NOWHERE/m\.yaml"),
    ],
)
def test_a_variable_that_is_not_set_is_named_with_its_key(scratch, override, key):
    with pytest.raises(ConfigError, match=key + ": the environment variable NOWHERE is not set"):
        load_run(RUN, [override])


def test_a_tool_tells_it_as_argparse_does(scratch):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/merge_datasets.py"), "--input", "a"]
        + ["--output-prefix", "$NOWHERE/x"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "argument --output-prefix: $NOWHERE/x: the environment variable NOWHERE" in done.stderr

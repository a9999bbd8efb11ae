"""The console script and the files in tools/: the same commands, quick help, one convention."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.cli import __main__ as program
from equilibrium_mcore.cli import convert
from equilibrium_mcore.cli.command import (
    run_command,
    run_subcommand,
    with_commands,
    wrong_command_line,
)
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import COMMANDS, PACKAGE, command

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "megatron", "matplotlib", "datatrove", "safetensors")
SHARED = ("__init__", "__main__", "command")  # modules of cli/ that are no commands


def python(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


# ------------------------------------------------------------------------------- which there are


def test_every_tool_is_a_command_and_every_command_a_tool_or_a_module():
    tools = {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
    assert tools == {tool for tool in COMMANDS.values() if not tool.startswith("-m ")}
    assert {tool for tool in COMMANDS.values() if tool.startswith("-m ")} == {
        "-m equilibrium_mcore.train"
    }
    modules = {path.stem for path in (PACKAGE / "cli").glob("*.py")} - set(SHARED)
    assert modules == {name.replace("-", "_") for name in COMMANDS}
    grouped = [name for names in program.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(COMMANDS)


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "run"])
def test_a_tool_is_its_command_and_says_so(name):
    path = ROOT / COMMANDS[name]
    sentence = docstring(path)
    assert sentence.rstrip(".") == program.sentence(name)
    assert sentence.endswith(".") and "\n" not in sentence
    assert f'run_tool("{name}")' in path.read_text() and len(path.read_text().splitlines()) <= 6


def test_the_help_has_a_sentence_for_each_command(capsys):
    assert program.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S+ .*\S$", text, re.M), name
    for example in re.findall(r"^  equilibrium-mcore (\S+)", text, re.M):
        assert example in COMMANDS
    assert program.main(["--version"]) == 0
    assert re.fullmatch(r"equilibrium-mcore \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("words", [[], ["tran"], ["--what"]])
def test_what_is_no_command_is_a_wrong_command_line(words, capsys):
    assert program.main(words) == 2
    told = capsys.readouterr()
    assert "train" in told.out + told.err
    if words == ["tran"]:
        assert "did you mean train?" in told.err


# ------------------------------------------------------------------------------------------ help

HELP = """
import sys
from equilibrium_mcore.cli.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(*(name for name in sys.modules if "." not in name), file=sys.stderr)
"""


def same_names(text: str) -> str:
    """`text` on one line, with <prepare> for both names of that command."""
    text = " ".join(text.split())
    for name, tool in COMMANDS.items():
        text = text.replace(f"python {tool}", f"<{name}>")
    names = "|".join(sorted(COMMANDS, key=len, reverse=True))
    return re.sub(rf"equilibrium-mcore ({names})\b", r"<\1>", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_both_print_the_same_help_and_import_nothing_heavy_for_it(name):
    ours = python("-c", HELP, name, "--help")
    theirs = python(*COMMANDS[name].split(), "--help")
    assert theirs.returncode == 0, theirs.stderr
    assert f"equilibrium-mcore {name} " in ours.stdout and "python tools" not in ours.stdout
    assert f"python {COMMANDS[name]} " in theirs.stdout and "{prog}" not in theirs.stdout
    assert same_names(ours.stdout) == same_names(theirs.stdout)
    assert not set(ours.stderr.split()) & set(HEAVY)


def test_help_names_other_commands_as_this_one_is_called():
    assert with_commands("{prog} {resume}", "equilibrium-mcore train") == (
        "equilibrium-mcore train equilibrium-mcore resume"
    )
    assert with_commands("{prog} {resume} {x}", "python tools/train.py") == (
        "python tools/train.py python tools/resume_training.py {x}"
    )


def test_messages_name_the_commands_of_this_installation():
    assert command("prepare") == "python tools/prepare_dataset.py"
    assert command("run") == "python -m equilibrium_mcore.train"


def test_choices_that_are_written_down_are_those_of_the_work():
    from equilibrium_mcore.hugging_face.weights import DTYPES

    assert tuple(DTYPES) == convert.DTYPES


# --------------------------------------------------------------------------------------- statuses


def fails_with(error):
    def work(_):
        if error is not None:
            raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (None, 0, ""),
        (ValueError("bad line"), 1, "error: bad line\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
        (ImportError("pip install it"), 1, "error: pip install it\n"),
        (ConfigError("a=1: must be 2"), 2, "error: 1 problem:\n  1. a=1: must be 2\n"),
        (wrong_command_line("--a needs --b"), 2, "error: 1 problem in the command line:\n  1. --a"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_statuses(error, status, told, capsys):
    assert run_command("", lambda parser: None, fails_with(error), arguments=[]) == status
    assert capsys.readouterr().err.startswith(told)


def test_the_works_own_status_and_argparses_are_kept(capsys):
    assert run_command("", lambda parser: None, lambda options: 3, arguments=[]) == 3
    with pytest.raises(SystemExit) as leaving:
        run_command("", lambda parser: None, lambda options: 0, arguments=["--what"])
    assert leaving.value.code == 2 and "--what" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command("", lambda parser: None, fails_with(KeyError("x")), arguments=[])
    with pytest.raises(ValueError):
        run_command("", lambda parser: None, fails_with(ValueError("x")), arguments=[], told=())


def test_a_command_works_from_any_folder(tmp_path):
    done = python("-m", "equilibrium_mcore.cli", "count", "equilibrium_tiny", folder=tmp_path)
    assert done.returncode == 0 and "3,004,048" in done.stdout, done.stderr
    done = python(
        "-m", "equilibrium_mcore.cli", "pipeline", "configs/experiments/full_pipeline.yaml",
        "--dry-run", "--only", "export", folder=tmp_path,
    )  # fmt: skip
    assert "tools/convert_checkpoint.py --checkpoint=" in done.stdout
    assert done.returncode == 2 and "its input experiments/full_pipeline/grpo" in done.stderr


# ------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "99999999999999999999"])
def test_a_number_of_processes_has_a_range(value, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_subcommand("verify", [str(tmp_path), f"--workers={value}"], program="verify")
    assert stopped.value.code == 2
    assert "must be a whole number from 1 to 1,024" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--workers", "--local"])
def test_double_dashes_are_no_value(option, capsys, tmp_path):
    words = ["mixture.yaml", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run_subcommand("prepare", [*words, f"{option}=--"], program="prepare")
    assert stopped.value.code == 2 and "-- is no value" in capsys.readouterr().err
    assert run_subcommand("prepare", words, program="prepare") == 2  # lists that are meant
    assert "mixture.yaml: no such file" in capsys.readouterr().err

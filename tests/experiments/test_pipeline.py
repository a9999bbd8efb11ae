"""Pipelines: order, references, what runs again and why, failures and kills; with trivial steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.experiments.fingerprints import WHOLE_BYTES, fingerprint
from equilibrium_mcore.experiments.pipeline import load_pipeline
from equilibrium_mcore.experiments.pipeline_run import (
    STOPPED,
    StepSelection,
    run_pipeline,
    unfinished_run,
)
from equilibrium_mcore.experiments.pipeline_state import STATE_FILE, one_at_a_time

ROOT = Path(__file__).parents[2]
# Writes its words and what it reads into its first argument, and notes that it ran.
COPY = """\
import pathlib, sys
target, *sources = sys.argv[1:]
if pathlib.Path("fail").exists():
    raise SystemExit(7)
text = "".join(pathlib.Path(s).read_text() if pathlib.Path(s).is_file() else s for s in sources)
pathlib.Path(target).write_text(text)
with open("ran", "a") as log:
    log.write(target.split("/")[-1] + " ")
"""
TWO = """\
name: two
folder: out
variables: {text: hello, more: []}
steps:
  - name: second
    command: [write.py, "${second.file}", "${first.file}", "${more}"]
    inputs: ["${first.file}"]
    outputs: {file: "${folder}/b"}
  - name: first
    command: [write.py, "${first.file}", source.txt, "${text}"]
    outputs: {file: "${folder}/a"}
"""


@pytest.fixture
def two(here: Path) -> Path:
    (here / "write.py").write_text(COPY)
    (here / "source.txt").write_text("source ")
    (here / "two.yaml").write_text(TWO)
    return here


def run(*changes: str, file: str = "two.yaml", **choice) -> tuple[int, list[str]]:
    """Run it; the status, and what was said."""
    said: list[str] = []
    pipeline = load_pipeline(Path(file), changes)
    status = run_pipeline(pipeline, StepSelection(**choice), command_line="again", say=said.append)
    return status, said


def ran() -> str:
    """The files that steps wrote since it was asked last."""
    log = Path("ran")
    text = log.read_text().strip() if log.exists() else ""
    log.unlink(missing_ok=True)
    return text


def test_steps_run_in_the_order_of_their_needs_and_not_again(two):
    assert run()[0] == 0
    assert ran() == "a b"
    assert (two / "out/b").read_text() == "source hello"
    status, said = run()
    assert status == 0 and ran() == "" and said[:2] == ["first: unchanged", "second: unchanged"]


@pytest.mark.parametrize(
    ("change", "runs", "reason"),
    [
        (lambda: Path("source.txt").write_text("other "), "a b", "source.txt changed"),
        (lambda: Path("out/b").unlink(), "b", "out/b is not there"),
        (lambda: Path("out/a").write_text("edited"), "b", "out/a changed"),
        (lambda: os.utime("source.txt", (1, 1)), "", "unchanged"),  # by content, not by time
    ],
)
def test_what_changed_runs_again_and_what_follows_from_it(two, change, runs, reason):
    run()
    ran()
    change()
    said = run()[1]
    assert ran() == runs
    assert any(reason in line for line in said)


def test_variables_change_commands_and_lists_become_words(two):
    run()
    ran()
    assert run("more=[x, y]")[0] == 0
    assert ran() == "b" and (two / "out/b").read_text() == "source helloxy"
    run("more=[x, y]", "text=bye")
    assert ran() == "a b" and (two / "out/b").read_text() == "source byexy"


def test_a_launcher_is_a_list_before_the_tool(two):
    text = (two / "two.yaml").read_text().replace("[write.py", '["${launcher}", write.py')
    (two / "two.yaml").write_text(text.replace("{text:", "{launcher: [], text:"))
    assert run()[0] == 0 and ran() == "a b"
    assert run("launcher=[-m, cProfile, -o, profile]")[0] == 0
    assert ran() == "a b" and (two / "profile").exists()


def test_what_an_outdated_step_wrote_is_kept_aside(two):
    run()
    run("text=bye")
    assert (two / "out/a").read_text() == "source bye"
    kept = sorted(path.read_text() for path in (two / "out/archive").glob("*/*"))
    assert kept == ["source hello", "source hello"]  # of both steps
    run("text=third", keep=True)
    assert len(list((two / "out/archive").glob("*/*"))) == 2


def test_a_step_whose_text_does_not_change_stops_the_wave(two):
    run()
    ran()
    text = (two / "two.yaml").read_text()
    (two / "two.yaml").write_text(text.replace('source.txt, "${text}"', "source.txt, hel, lo"))
    run()
    assert ran() == "a"  # its command changed, what it wrote did not


def test_a_failure_stops_with_its_status_and_is_continued(two):
    (two / "fail").touch()
    status, said = run()
    assert status == 7 and ran() == ""
    assert said[-1].startswith("first: failed with exit status 7") and said[-1].endswith("again")
    (two / "fail").unlink()
    assert run()[0] == 0 and ran() == "a b"
    Path("out/b").unlink()
    (two / "fail").touch()
    assert run()[0] == 7
    (two / "fail").unlink()
    status, said = run()
    assert (status, ran()) == (0, "b")
    assert any("it was begun, and did not end" in line for line in said)


def test_an_output_that_is_not_written_is_a_failure(two):
    text = (two / "two.yaml").read_text()
    (two / "two.yaml").write_text(text.replace('"${folder}/a"}', '"${folder}/a", no: out/no}'))
    status, said = run()
    assert status == 1 and "its output no, out/no, is not there" in said[-2]


def test_only_from_again_and_dry_run(two):
    with pytest.raises(ConfigError, match=r"input out/a is not there: run step first first"):
        run(only="second")
    assert run(dry_run=True)[0] == 0
    assert not (two / "out").exists() and ran() == ""
    assert run(only="first")[0] == 0 and ran() == "a"
    said = run(dry_run=True)[1]
    assert said[0] == "first: unchanged" and "second: it never ran" in said
    assert run(start="second")[0] == 0 and ran() == "b"
    assert run(again=True)[0] == 0 and ran() == "a b"
    said = run("text=bye", dry_run=True)[1]
    assert "first: its command changed" in said
    assert "second: perhaps: it reads what first writes" in said
    with pytest.raises(ConfigError, match=r"step frist: .*did you mean 'first'"):
        run(only="frist")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("${text}", "${txt}", r"step first: .*\$\{txt\} is no variable.*did you mean 'text'"),
        ("${first.file}\"]", "${first.fil}\"]", r"first\.fil\} is no variable.*'first\.file'"),
        ("source.txt,", "\"${second.file}\",", r"wait for each other: .*second needs first"),
        ("name: second", "name: first", r"step first: there are two of that name"),
        ("write.py", "cp", r"command begins with 'cp': it must be a tool"),
        ("${folder}/b", "${folder}/a", r"its output file is out/a, as second\.file is"),
        ("\"${more}\"", "\"--m=${more}\"", r"\$\{more\} is a list, so it must stand alone"),
        ("steps:", "stepz:", r"stepz: unknown key; did you mean 'steps'"),
        ("folder: out", "folder: 3", r"folder=3: must be text"),
        ("{text: hello", "{name: x, text: hello", r"variables\.name: every pipeline has it"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_file_is_told_before_anything_runs(two, old, new, says):
    text = (two / "two.yaml").read_text()
    assert old in text
    (two / "two.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        run()
    assert ran() == ""


def test_wrong_changes_tools_and_inputs_are_told(two):
    for change, says in [
        ("txt=1", r"txt=1: write VARIABLE=VALUE; did you mean 'text'"),
        ("text", r"text: write VARIABLE=VALUE"),
        ("text=[a, b]", r"text=\['a', 'b'\]: must be one value"),
    ]:
        with pytest.raises(ConfigError, match=says):
            run(change)
    (two / "two.yaml").write_text(TWO.replace("source.txt, ", "").replace("write.py", "tools/x.py"))
    with pytest.raises(ConfigError, match=r"step first: tools/x\.py is not there"):
        run()


def test_two_do_not_run_in_one_folder_and_a_foreign_state_is_refused(two):
    with one_at_a_time(two / "out"), pytest.raises(ConfigError, match="a pipeline runs in it"):
        run()
    (two / "out" / STATE_FILE).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as the state"):
        run()
    (two / "out" / STATE_FILE).write_text(json.dumps({"pipeline": "other", "steps": {}}))
    with pytest.raises(ConfigError, match="state of the pipeline 'other', not of 'two'"):
        run()


def test_a_signal_is_handed_on_and_the_step_is_not_done(two):
    """The step saves and ends with status 0 when it is terminated, as a training run does."""
    (two / "write.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "pathlib.Path(sys.argv[1]).write_text('half')\n"
        "pathlib.Path('waits').touch()\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.05)\n"
    )
    command = [sys.executable, str(ROOT / "tools/run_pipeline.py"), "two.yaml"]
    process = subprocess.Popen(command, cwd=two, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (two / "waits").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED and "continues with this step: python " in said
    state = json.loads((two / "out" / STATE_FILE).read_text())
    assert state["steps"]["first"]["done"] is False
    (two / "go").touch()
    done = subprocess.run(command, cwd=two, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "it was begun, and did not end" in done.stdout


def test_a_run_that_stopped_before_its_end_is_not_done(here):
    assert unfinished_run(here) is None
    events = [{"kind": "event", "event": "start", "step": 0}, {"kind": "train", "step": 3}]
    lines = [json.dumps(e) for e in [*events, {"kind": "event", "event": "stop", "step": 3}]]
    (here / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "stopped at step 3" in unfinished_run(here)
    with (here / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"kind": "event", "event": "end", "step": 9}) + "\n")
        stream.write('{"kind": "event", "ev')  # another process begins to write
    assert unfinished_run(here) is None


def test_folders_and_large_files_as_inputs(here):
    folder = here / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/a").write_text("1")
    first = fingerprint(folder)
    (folder / ".probe").write_text("no content")
    (folder / "run.lock").write_text("no content")
    os.utime(folder / "deep/a", (1, 1))
    assert fingerprint(folder) == first
    (folder / "deep/a").rename(folder / "deep/b")
    renamed = fingerprint(folder)
    (folder / "deep/b").write_text("2")
    assert len({json.dumps(f) for f in (first, renamed, fingerprint(folder))}) == 3
    large = here / "large"
    with large.open("wb") as stream:
        stream.truncate(WHOLE_BYTES + 1)
    before = fingerprint(large)
    assert before == fingerprint(large) and "sha256" not in before
    os.utime(large, (1, 1))
    assert fingerprint(large) != before
    assert fingerprint(here / "absent") is None


def test_the_shipped_pipeline_is_a_pipeline():
    pipeline = load_pipeline(ROOT / "configs/experiments/full_pipeline.yaml", ["folder=x"])
    names = [step.name for step in pipeline.steps]
    assert names == [
        *("prepare_pretrain", "prepare_midtrain", "prepare_sft", "prepare_dpo", "prepare_grpo"),
        *("pretrain", "midtrain", "sft", "dpo", "grpo", "export"),
    ]
    assert pipeline.step("sft").needs == ["prepare_sft", "midtrain"]
    assert pipeline.step("dpo").needs == ["prepare_dpo", "sft"]
    assert pipeline.step("grpo").needs == ["prepare_grpo", "dpo"]
    assert pipeline.step("export").needs == ["grpo"]
    for step in pipeline.steps:
        assert (ROOT / step.command[0]).is_file()

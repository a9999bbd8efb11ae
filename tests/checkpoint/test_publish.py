"""Which checkpoints a run removes: its own line's, and nothing else. Folders are made up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.checkpoint import directory, publish
from equilibrium_mcore.checkpoint.lineage import WRITER_FILE, Lineage
from equilibrium_mcore.checkpoint.manifest import describe_file, write_manifest
from equilibrium_mcore.files import whole
from equilibrium_mcore.files.owner import process_start


def save(run: Path, step: int, line: Lineage, *, keep_last: int = 2) -> str | None:
    """A checkpoint as a run of `line` writes it, but for the data."""
    final = directory.checkpoint_path(run, step)
    publish.remove_partial(run, line)
    content = publish.start_partial(final, line)
    directory.write_state(content, {"step": step, "run": line.facts()})
    write_manifest(content, {"state.json": describe_file(content / "state.json")})
    renamed = publish.publish(final, line)
    for old in publish.drop_oldest(run, line, keep_last=keep_last):
        shutil.rmtree(old)
    return renamed


def resumed(run: Path) -> Lineage:
    """The line of a run that continues what a run would continue."""
    return Lineage.after(directory.read_state(directory.latest_checkpoint(run)))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in directory.checkpoints_directory(run).iterdir())


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that has saved after steps 4, 8 and 12."""
    line = Lineage.new()
    for step in (4, 8, 12):
        save(tmp_path, step, line, keep_last=3)
    return tmp_path


def go_back(run: Path, step: int) -> Lineage:
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    return resumed(run)


def test_a_run_and_those_that_continue_it_keep_the_last(run):
    line = resumed(run)
    save(run, 16, line)
    assert names(run) == ["latest", "step_00000012", "step_00000016"]
    save(run, 20, resumed(run))
    assert names(run) == ["latest", "step_00000016", "step_00000020"]


def test_going_back_keeps_that_step_and_leaves_the_bad_one(run):
    line = go_back(run, 8)
    assert publish.left_alone(run, line).keys() == {"step_00000012"}
    save(run, 10, line)
    # 4 and 8 are on the line, 12 is not.
    assert names(run) == ["latest", "step_00000008", "step_00000010", "step_00000012"]
    assert directory.latest_checkpoint(run).name == "step_00000010"
    again = resumed(run)
    save(run, 14, again)
    assert names(run) == ["latest", "step_00000010", "step_00000012", "step_00000014"]


def test_the_step_of_the_branch_that_was_left_is_renamed(run):
    before = directory.read_state(directory.checkpoint_path(run, 12))
    line = go_back(run, 8)
    assert save(run, 12, line) == "step_00000012.abandoned-1"
    assert save(run, 12, go_back(run, 8)) == "step_00000012.abandoned-2"
    kept = run / "checkpoints" / "step_00000012.abandoned-1"
    assert directory.read_state(kept) == before
    assert directory.read_state(directory.latest_checkpoint(run))["run"]["id"] != line.run


def test_a_lost_latest_finds_the_last_saved_and_not_the_highest(run):
    save(run, 10, go_back(run, 8), keep_last=4)
    (run / "checkpoints" / "latest").unlink()
    order, wrong = directory.resume_order(run)
    assert [path.name[-2:] for path in order] == ["10", "08", "04"] and wrong == "is missing"
    assert not names(run).count("latest")


def test_what_others_wrote_is_left(run):
    folder = run / "checkpoints"
    (folder / "step_00000001").mkdir()
    (folder / "step_00000001" / "notes.txt").write_text("the user's")
    (folder / "step_00000004" / "notes.txt").write_text("the user's")
    (folder / "step_00000004.partial").mkdir()  # of before there were notes of the writer
    (folder / "mine.partial").write_text("the user's")
    line = resumed(run)
    left = publish.left_alone(run, line)
    assert "notes.txt" in left["step_00000004"]
    assert left.keys() == {
        "step_00000001",
        "step_00000004",
        "step_00000004.partial",
        "mine.partial",
    }
    save(run, 16, line, keep_last=1)
    assert names(run) == sorted(["latest", "step_00000016", *left])


def test_links_are_no_error_and_what_they_name_stays(run, tmp_path):
    folder, elsewhere = run / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in ("04", "08", "12"):
        (folder / f"step_000000{step}").rename(elsewhere / f"step_000000{step}")
        (folder / f"step_000000{step}").symlink_to(elsewhere / f"step_000000{step}")
    line = resumed(run)
    assert save(run, 12, line, keep_last=1) == "step_00000012.abandoned-1"
    save(run, 16, line, keep_last=1)
    assert names(run) == [
        "latest",
        "step_00000004",
        "step_00000008",
        "step_00000012.abandoned-1",
        "step_00000016",
    ]
    assert sorted(os.listdir(elsewhere)) == ["step_00000004", "step_00000008", "step_00000012"]


def test_those_of_before_there_were_ids_are_their_successors(tmp_path):
    for step in (4, 8, 12):
        folder = directory.checkpoint_path(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
    line = go_back(tmp_path, 8)
    save(tmp_path, 10, line)
    assert names(tmp_path) == ["latest", "step_00000008", "step_00000010", "step_00000012"]


# ------------------------------------------------------------------------------- partial folders

KILLED = """
import os
from pathlib import Path
from equilibrium_mcore.checkpoint import publish
from equilibrium_mcore.checkpoint.lineage import Lineage
publish.start_partial(Path("{final}"), Lineage.new())
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed(run):
    final = directory.checkpoint_path(run, 16)
    subprocess.run([sys.executable, "-c", KILLED.format(final=final)])
    (left,) = (run / "checkpoints").glob("*.partial")
    line = resumed(run)
    assert left.name not in publish.left_alone(run, line)
    assert publish.remove_partial(run, line) == [left.name]


def test_a_killed_process_is_dead_before_anybody_has_waited_for_it(run):
    final = directory.checkpoint_path(run, 16)
    killed = subprocess.Popen([sys.executable, "-c", KILLED.format(final=final)])
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    (left,) = (run / "checkpoints").glob("*.partial")
    assert publish.remove_partial(run, Lineage.new()) == [left.name]
    killed.wait()


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"pid": os.getppid()}, True),  # alive
        ({"pid": os.getppid(), "process_start": 1}, False),  # another process has the number now
        ({"host": "another"}, True),
        ({"machine": "another"}, True),
        ({"slurm_job": "7", "host": "another"}, True),
        ({}, False),  # this process: its save is over
    ],
)
def test_a_partial_folder_stays_while_its_writer_may_live(run, change, stays):
    publish.start_partial(directory.checkpoint_path(run, 16), Lineage.new())
    (partial,) = (run / "checkpoints").glob("*.partial")
    note = json.loads((partial / WRITER_FILE).read_text())
    if change.get("pid") and "process_start" not in change:
        change = {**change, "process_start": process_start(change["pid"])}
    (partial / WRITER_FILE).write_text(json.dumps({**note, "owner": note["owner"] | change}))
    assert bool(publish.remove_partial(run, Lineage.new())) != stays
    assert partial.exists() == stays


def test_a_requeued_job_removes_what_it_left_on_another_host(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    publish.start_partial(directory.checkpoint_path(run, 16), Lineage.new())
    (partial,) = (run / "checkpoints").glob("*.partial")
    note = json.loads((partial / WRITER_FILE).read_text())
    other = note["owner"] | {"host": "another"}
    (partial / WRITER_FILE).write_text(json.dumps({**note, "owner": other}))
    assert not publish.remove_partial(run, Lineage.new())  # the same start of the job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert publish.remove_partial(run, Lineage.new()) == [partial.name]


def test_a_kill_while_removing_leaves_no_half_checkpoint(run, monkeypatch):
    remove = shutil.rmtree

    def killed(path, **how):
        if not (path / "state.json").exists():  # the partial folder, empty by now
            return remove(path, **how)
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(whole.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 16, resumed(run))
    monkeypatch.undo()
    assert all(directory.peek_state(path) for path in directory.list_checkpoints(run))
    save(run, 20, resumed(run))
    assert names(run) == ["latest", "step_00000016", "step_00000020"]

"""A run's output directory: probed early, one run at a time, and nothing in it is lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.files.owner import Owner
from equilibrium_mcore.training.metrics import read_metrics
from equilibrium_mcore.training.run_folder import LOCK_FILE, check_run_folder, owned_run_folder
from tests.support.pool import RankError
from tests.support.runs import tiny_run

ROOT = Path(__file__).parents[2]
SMALL = {"layer_pattern": "M-"}


def pretrain(config_file: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "equilibrium_mcore.pretrain", str(config_file), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------- one run at a time


def test_a_second_run_is_refused_and_a_killed_ones_folder_is_free_at_once(data, tmp_path):
    config = tiny_run(data, tmp_path / "run", model=SMALL, training={"steps": 100_000})
    save_config(config, tmp_path / "run.yaml")
    metrics = config.output_directory / "metrics.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-m", "equilibrium_mcore.pretrain", str(tmp_path / "run.yaml")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while not metrics.exists() or not any(r["kind"] == "train" for r in read_metrics(metrics)):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        second = pretrain(tmp_path / "run.yaml")
        assert second.returncode == 2 and "Traceback" not in second.stderr
        assert "another run works in it" in second.stderr
        assert f"process {first.pid} on " in second.stderr
        steps = len(read_metrics(metrics))
        deadline = time.monotonic() + 60
        while len(read_metrics(metrics)) <= steps:  # it trains on, in its own file
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        first.kill()
        first.wait()
    before = metrics.read_bytes()
    third = pretrain(tmp_path / "run.yaml", "training.stop_after_steps=1")
    assert third.returncode == 0, third.stderr
    assert "taken over from run 'test'" in third.stdout
    assert not (config.output_directory / LOCK_FILE).exists()
    # The first had saved nothing, so the third began from scratch; its record is not lost.
    assert (config.output_directory / "archive/1/metrics.jsonl").read_bytes() == before


def train_until_taken_over(rank_info, config) -> None:
    """A run whose lock another host takes after the first step; it is to save at the second."""
    from equilibrium_mcore.training.all_callbacks import build_callbacks
    from equilibrium_mcore.training.loop import Callback, train
    from equilibrium_mcore.training.setup import setup

    class TakeOver(Callback):
        def on_step(self, run, outcome):
            if run.is_first_rank and run.progress.step == 1:
                other = replace(Owner.of_this_process("other"), host="far")
                (config.output_directory / LOCK_FILE).write_text(other.to_text())

    with owned_run_folder(config, is_first_rank=rank_info.rank == 0) as lock:
        train(setup(config, rank_info), [*build_callbacks(config, lock), TakeOver()])


def test_a_run_that_lost_its_folder_stops_before_it_saves(ranks, data, tmp_path):
    config = tiny_run(
        data,
        tmp_path,
        model=SMALL,
        parallelism={"world_size": 2},
        checkpoint={"save_interval_steps": 2},
    )
    with pytest.raises(RankError) as caught:
        ranks.run(2, train_until_taken_over, config)
    assert "taken over by run 'other'" in str(caught.value) and caught.value.refused
    assert not (tmp_path / "checkpoints").exists()
    assert Owner.from_text((tmp_path / LOCK_FILE).read_text()).host == "far"
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")][-1] == 2


@pytest.mark.parametrize("error", [None, RuntimeError, SystemExit])
def test_the_lock_is_released_however_the_run_ends(data, tmp_path, error):
    config = tiny_run(data, tmp_path)
    try:
        with owned_run_folder(config, is_first_rank=True):
            assert (tmp_path / LOCK_FILE).is_file()
            with owned_run_folder(config, is_first_rank=False):  # another rank of the same run
                pass
            with pytest.raises(ConfigError, match="another run works in it"):
                check_run_folder(config)
            if error:
                raise error
    except (RuntimeError, SystemExit):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


# ---------------------------------------------------------------------------- it can be written


def test_the_command_says_it_in_its_own_words_before_it_reads_data(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = pretrain(
        ROOT / "configs/runs/quickstart.yaml",
        f"output_directory={tmp_path}/file/run",
        f"data.sources.0.prefix={tmp_path}/absent",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"output_directory='{tmp_path}/file/run': cannot be made: Not a directory" in done.stderr
    assert "choose another output_directory" in done.stderr


def test_a_file_of_that_name_is_left_alone(data, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match=r"output_directory='.*/run': cannot be made: File exist"):
        check_run_folder(tiny_run(data, tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def refused_in(rank_info, config, *, user: int | None, limit: int | None) -> str:
    """The refusal of a process with another user's rights, or that may write no more bytes.

    It has its own again afterwards: a rank hands its result over in a file.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    if user is not None:
        os.setgroups([])
        os.seteuid(user)
    try:
        with pytest.raises(ConfigError) as caught:
            check_run_folder(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if user is not None:
            os.seteuid(0)
    return str(caught.value)


def refused_without_rights(rank_info, config) -> str:
    return refused_in(rank_info, config, user=65534 if os.geteuid() == 0 else None, limit=None)


def refused_for_want_of_room(rank_info, config) -> str:
    return refused_in(rank_info, config, user=None, limit=4096)


@pytest.mark.parametrize("name", [".", "new"])
def test_a_folder_that_is_read_only(ranks, data, tmp_path, name):
    tmp_path.chmod(0o555)
    try:
        (text,) = ranks.run(1, refused_without_rights, tiny_run(data, tmp_path / name))
    finally:
        tmp_path.chmod(0o755)
    assert "Permission denied" in text and "give write permission" in text


def test_a_folder_without_room(ranks, data, tmp_path):
    """An empty file can be made there; what a quota or a full disk refuses is content."""
    (text,) = ranks.run(1, refused_for_want_of_room, tiny_run(data, tmp_path / "run"))
    assert "cannot be written: File too large" in text
    assert os.listdir(tmp_path / "run") == []


# -------------------------------------------------------------------------- an earlier run in it


@pytest.fixture
def used(tmp_path) -> Path:
    """What an earlier run left, beside a file of the user's."""
    (tmp_path / "checkpoints/step_00000004").mkdir(parents=True)
    (tmp_path / "tensorboard").mkdir()
    for name in ("metrics.jsonl", "ledger.jsonl", "config.yaml", "notes.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


RECORD = {"metrics.jsonl", "ledger.jsonl", "config.yaml", "tensorboard"}


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl"])
def test_never_resuming_in_a_used_folder_is_refused(data, used, left):
    config = tiny_run(data, used, checkpoint={"resume": "never"})
    for name in {"checkpoints", "metrics.jsonl", "ledger.jsonl"} - {left}:
        (used / name).rename(used / f"{name}.away")
    with pytest.raises(ConfigError, match=rf"resume=never.*earlier run \({left}.*used_directory=a"):
        check_run_folder(config)
    assert (used / left).exists()


def test_never_resuming_moves_everything_where_it_is_told_to(data, used):
    settings = {"resume": "never", "used_directory": "archive"}
    with owned_run_folder(tiny_run(data, used, checkpoint=settings), is_first_rank=True):
        assert names_in(used) == {"archive", "notes.txt", LOCK_FILE}
    assert names_in(used / "archive/1") == RECORD | {"checkpoints"}
    assert names_in(used / "archive/1/checkpoints") == {"step_00000004"}


def test_weights_are_not_moved_from_under_the_run(data, used):
    weights = used / "checkpoints/step_00000004"
    settings = {
        "resume": "never",
        "used_directory": "archive",
        "initial_weights": str(weights),
    }
    with pytest.raises(ConfigError, match="initial_weights.*lies in output_directory"):
        check_run_folder(tiny_run(data, used, checkpoint=settings))
    assert weights.is_dir()


def test_a_start_after_a_start_that_saved_nothing_keeps_its_record(data, used):
    (used / "checkpoints/step_00000004").rmdir()
    with owned_run_folder(tiny_run(data, used), is_first_rank=True):
        assert names_in(used) == {"archive", "checkpoints", "notes.txt", LOCK_FILE}
    assert names_in(used / "archive/1") == RECORD


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_that_resumes_moves_nothing(data, used, resume):
    before = names_in(used)
    with owned_run_folder(tiny_run(data, used, checkpoint={"resume": resume}), is_first_rank=True):
        assert names_in(used) == before | {LOCK_FILE}
    assert names_in(used) == before


def test_a_folder_with_files_of_the_users_alone_is_not_used(data, tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with owned_run_folder(tiny_run(data, tmp_path, checkpoint={"resume": "never"}),
                          is_first_rank=True):  # fmt: skip
        assert names_in(tmp_path) == {"config.yaml", LOCK_FILE}

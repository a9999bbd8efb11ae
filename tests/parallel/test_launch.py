"""Ranks that are started here: signals, kills, where they are; and places under launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.parallel.launch import rank_info_from_environment, this_command
from equilibrium_mcore.training.metrics import read_metrics
from tests.support.processes import await_text, still_there
from tests.support.runs import tiny_run

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 600  # for a hang alone


def test_rank_info_under_torchrun():
    rank_info = rank_info_from_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (rank_info.rank, rank_info.world_size, rank_info.local_rank) == (3, 8, 1)


def test_rank_info_under_srun():
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "5",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    rank_info = rank_info_from_environment(environment)
    assert (rank_info.rank, rank_info.world_size, rank_info.local_rank) == (5, 16, 5)
    del environment["MASTER_ADDR"]
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        rank_info_from_environment(environment)


def test_the_words_that_a_launcher_takes(monkeypatch):
    """What a GPU host is told: a module of the package by its name, a tool by its path."""
    main = ROOT / "equilibrium_mcore" / "train.py"
    monkeypatch.setattr(sys, "argv", [str(main), "a run.yaml", "training.steps=3"])
    assert this_command() == "-m equilibrium_mcore.train 'a run.yaml' training.steps=3"
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "--stage", "sft"])
    assert this_command() == "tools/train.py --stage sft"


def test_started_plainly_has_no_rank():
    # A batch script that is no job step has these, and is one process.
    assert rank_info_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


@pytest.fixture
def started(data, tmp_path):
    """The command line of a tiny run on two ranks, as a person would start it."""
    config = tiny_run(
        data,
        tmp_path / "run",
        parallelism={"world_size": 2, "expert": 2},
        training={"steps": 400, "validation_interval_steps": 100, "validation_batches": 1},
    )
    save_config(config, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "equilibrium_mcore.pretrain", str(tmp_path / "run.yaml")]
    return command, tmp_path / "run"


def test_sigterm_saves_and_the_same_command_goes_on(started):
    command, folder = started
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not metrics.exists() or not any(r["kind"] == "train" for r in read_metrics(metrics)):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=TIMEOUT_SECONDS)
    assert job.returncode == 0, errors.decode()
    stopped = read_metrics(metrics)
    assert stopped[-1]["event"] == "signal"
    step = stopped[-1]["step"]
    assert 0 < step < 400
    state = json.loads((folder / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    assert state["step"] == step

    again = subprocess.run(
        [*command, f"training.stop_after_steps={step + 3}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert again.returncode == 0, again.stderr
    records = read_metrics(metrics)
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == list(range(1, step + 4))
    assert [r["event"] for r in records if r["kind"] == "event"] == [
        "start",
        "signal",
        "resume",
        "verified",
        "stop",
    ]


def test_a_job_says_where_its_ranks_are_and_they_end_with_it(started, tmp_path):
    """Killed, the job can tell nobody: ranks, their workers and folders end by themselves."""
    command, folder = started
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with (tmp_path / "errors").open("w") as errors:
        job = subprocess.Popen(
            [*command, "data.num_workers=1", "checkpoint.save_interval_steps=1"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        await_text(folder / "metrics.jsonl", lambda text: '"train"' in text)
        job.send_signal(signal.SIGUSR2)
        said = await_text(tmp_path / "errors", lambda text: text.count("in train_rank") == 2)
        assert said.count("in train_rank") == 2, said
        assert "rank 0 (pid " in said and "rank 1 (pid " in said, said
        assert job.poll() is None
        descendants = [child.pid for child in psutil.Process(job.pid).children(recursive=True)]
        assert len(descendants) >= 5  # the helper, two ranks, a loader's worker of each
    finally:
        job.kill()
        job.wait()
    assert not still_there(descendants)
    assert not list(temporary.glob("equilibrium_*"))


def test_a_setting_that_cannot_be_is_told_without_a_traceback(started):
    command, _ = started
    job = subprocess.run(
        [*command, "parallelism.tensor=3", "training.precision=fp8", "trainin.steps=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    for text in ("trainin", "parallelism.tensor=3"):
        assert text in job.stderr


def test_what_the_host_lacks_is_told_before_anything_is_built(started):
    command, folder = started
    job = subprocess.run(
        [*command, "training.precision=fp16"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert job.returncode == 2
    assert "training.precision" in job.stderr and "needs a CUDA GPU" in job.stderr
    assert not folder.exists()


def test_torchrun_uses_its_ranks_and_goes_on_where_plain_ranks_stopped(started):
    command, folder = started
    settings = command[3:]
    plain = subprocess.run(
        [*command, "training.stop_after_steps=2", "parallelism.expert=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert plain.returncode == 0, plain.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = subprocess.run(
        [
            *launcher,
            "--nproc-per-node=2",
            "-m",
            "equilibrium_mcore.pretrain",
            *settings,
            "training.stop_after_steps=4",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert job.returncode == 0, job.stderr
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]

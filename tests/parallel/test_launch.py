"""Ranks that are started here: results, failures, signals; and places under launchers."""

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
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.parallel.launch import place_from_environment
from equilibrium_mcore.training.metrics import read_metrics
from tests.support.runs import tiny_run

ROOT = Path(__file__).parents[2]


def test_place_under_torchrun():
    place = place_from_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (place.rank, place.world_size, place.local_rank) == (3, 8, 1)


def test_place_under_srun():
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "5",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    place = place_from_environment(environment)
    assert (place.rank, place.world_size, place.local_rank) == (5, 16, 5)
    del environment["MASTER_ADDR"]
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        place_from_environment(environment)


def test_started_plainly_has_no_place():
    # A batch script that is no job step has these, and is one process.
    assert place_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


SCRIPT = """
import os, sys, time
from pathlib import Path
from equilibrium_mcore.parallel.launch import Place, start_ranks
import torch

def run_rank(place):
    torch.distributed.init_process_group(
        "gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size
    )
    {body}

folder = Path(sys.argv[1])
places = [Place(r, 3, r, f"file://{{folder}}/meet") for r in range(3)]
sys.exit(start_ranks(places, run_rank, folder=folder))
"""


def start(tmp_path: Path, body: str) -> subprocess.CompletedProcess:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(body=body))
    return subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_all_ranks_succeed(tmp_path):
    # One write each: ranks share the stream.
    job = start(tmp_path, "torch.distributed.barrier(); os.write(1, b'rank %d\\n' % place.rank)")
    assert job.returncode == 0, job.stderr
    assert sorted(job.stdout.split("\n")[:3]) == ["rank 0", "rank 1", "rank 2"]


def test_a_rank_that_fails_is_shown_first_and_ends_the_job(tmp_path):
    """The others wait in a collective for a rank that never comes: they must not hang."""
    body = "if place.rank == 1: raise ValueError('planted fault')\n    torch.distributed.barrier()"
    before = time.monotonic()
    job = start(tmp_path, body)
    assert time.monotonic() - before < 30  # most of it is importing torch
    assert job.returncode == 1
    assert job.stderr.index("rank 1 failed first:") < job.stderr.index("planted fault")
    assert "Traceback" in job.stderr.split("rank 1 failed first:")[1].splitlines()[1]
    assert "the other ranks were stopped" in job.stderr


def test_a_rank_that_is_killed_ends_the_job(tmp_path):
    body = (
        "import os, signal\n    if place.rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    torch.distributed.barrier()"
    )
    job = start(tmp_path, body)
    assert job.returncode == 1
    assert "rank 2 failed first:\nit ended by signal SIGKILL" in job.stderr


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
    deadline = time.monotonic() + 90
    while not metrics.exists() or not any(r["kind"] == "train" for r in read_metrics(metrics)):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=60)
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
        timeout=90,
    )
    assert again.returncode == 0, again.stderr
    records = read_metrics(metrics)
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == list(range(1, step + 4))
    assert [r["event"] for r in records if r["kind"] == "event"] == [
        "start",
        "signal",
        "resume",
        "stop",
    ]


def test_a_setting_that_cannot_be_is_told_without_a_traceback(started):
    command, _ = started
    job = subprocess.run(
        [*command, "parallelism.tensor=3", "training.precision=fp8", "trainin.steps=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    for text in ("trainin", "parallelism.tensor=3"):
        assert text in job.stderr


def test_what_the_host_lacks_is_told_before_anything_is_built(started):
    command, folder = started
    job = subprocess.run(
        [*command, "training.precision=fp16"], cwd=ROOT, capture_output=True, text=True, timeout=60
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
        timeout=90,
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
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert job.returncode == 0, job.stderr
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]

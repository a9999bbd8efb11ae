"""slurm/pretrain_3b.sh under a real Slurm of one node, which the test starts and stops.

Skips with a reason where Slurm is not installed; docs/guides/slurm.md says how to install it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from equilibrium_mcore.training.run_folder import LOCK_FILE
from examples.quickstart_summary import curve_faults

pytestmark = [pytest.mark.slurm, pytest.mark.slow]  # minutes: real jobs, queued again

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).with_name("local_cluster.sh")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
STEPS = 40
# What differs from a cluster of GPU nodes.
SBATCH_OPTIONS = (
    "--nodes=1",
    "--ntasks-per-node=2",
    "--cpus-per-task=1",
    "--gpus-per-node=0",
    "--time=30",
    "--partition=low",
)
OVERRIDES = (
    "parallelism.world_size=2",
    "parallelism.tensor=2",
    "parallelism.expert=2",
    "model.layer_pattern=ME|+E",
    "model.vocab_size=512",
    "training.sequence_length=128",
    "training.micro_batch_size=1",
    "training.global_batch_size=2",
    f"training.steps={STEPS}",
    "training.validation_interval_steps=0",
    "optimizer.schedule.warmup_steps=5",
    "checkpoint.save_interval_steps=0",
    "logging.interval_steps=1",
    "logging.tensorboard=false",
)
SHORT = ("training.steps=3", "optimizer.schedule.warmup_steps=1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """Talks to the Slurm of a `slurm.conf`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        # A test that itself runs in a Slurm job must not pass that job on.
        for name in list(self.environment):
            if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF":
                del self.environment[name]

    def call(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *overrides: str, output_directory: Path, venv: str = sys.prefix) -> str:
        """Submit the script as a user would; the job's id."""
        return self.call(
            "sbatch",
            "--parsable",
            *SBATCH_OPTIONS,
            f"--output={self.directory}/%j.log",
            "slurm/pretrain_3b.sh",
            *overrides,
            RUN_CONFIG="configs/runs/quickstart.yaml",
            OUTPUT_DIRECTORY=str(output_directory),
            VENV=venv,
        )

    def facts(self, job: str) -> dict[str, str]:
        """The job's KEY=VALUE facts, as scontrol shows them."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job: str) -> str:
        path = self.directory / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else "(no log)"

    def wait(self, job: str, what: str, until: Callable[[], bool], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            state = self.facts(job)["JobState"]
            if state in ENDED and not until():
                pytest.fail(f"job {job} is {state} before {what}:\n{self.log(job)}")
            if time.monotonic() > deadline:
                pytest.fail(f"after {seconds} s still not {what} ({state}):\n{self.log(job)}")
            time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=search)]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (docs/guides/slurm.md)")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("the job needs a node of 2 cores")
    # Not below pytest's folder: the path of munge's socket has at most 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="equilibrium-slurm-"))
    try:
        command = ["bash", str(CLUSTER), "start", str(directory)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout
        running = Cluster(directory)
        yield running
        subprocess.run(["scancel", "--user", str(os.getuid())], env=running.environment, timeout=30)
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(directory)], timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that name a small dataset, made with the tools from this package's sources."""
    folder = tmp_path_factory.mktemp("slurm_data")
    files = sorted((ROOT / "equilibrium_mcore").rglob("*.py"))
    lines = [json.dumps({"text": file.read_text(encoding="utf-8")}) for file in files]
    text = folder / "text.jsonl"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = folder / "tokenizer.model"

    def tool(name: str, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / "tools" / name), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    tool("train_tokenizer.py", "--input", str(text), "--output", str(model), "--vocab-size", "512")
    tool(
        "preprocess_data.py",
        *("--input", str(text), "--output-prefix", str(folder / "text"), "--append-eod"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)),
    )
    prefix = folder / "text_text_document"
    return (
        f"data.tokenizer.model={model}",
        "data.split=90,10,0",
        f"data.sources=[{{name: text, prefix: {prefix}, weight: 1.0}}]",
    )


def read(run: Path, kind: str) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [record for record in map(json.loads, whole_lines) if record["kind"] == kind]


def ranks_of(run: Path) -> list[int]:
    """The processes that train into this folder, but for srun."""
    wanted, found = f"output_directory={run}", []
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        is_rank = process.info["name"].startswith("python")
        if is_rank and wanted in (process.info["cmdline"] or ()):
            found.append(process.info["pid"])
    return found


def test_a_preempted_job_is_queued_again_and_resumes(
    cluster: Cluster, dataset: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(*OVERRIDES, *dataset, output_directory=run)
    cluster.wait(job, "at step 5", lambda: len(read(run, "train")) >= 5, seconds=300)

    # A job of a higher partition takes the node: Slurm sends SIGTERM to the ranks.
    cluster.call(
        *("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    )
    cluster.wait(
        job, "queued again", lambda: cluster.facts(job).get("Restarts") == "1", seconds=180
    )
    signals = [event for event in read(run, "event") if event["event"] == "signal"]
    assert len(signals) == 1, cluster.log(job)
    assert 5 <= signals[0]["step"] < STEPS

    cluster.wait(
        job, "completed", lambda: cluster.facts(job)["JobState"] == "COMPLETED", seconds=300
    )
    assert cluster.facts(job)["Restarts"] == "1", cluster.log(job)
    train, events = read(run, "train"), read(run, "event")
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert not curve_faults(train, events)
    assert events[-1]["event"] == "end"
    log = cluster.log(job)
    assert "back into the queue" in log
    assert f"job {job}, start 2: 2 ranks" in log
    assert f"job {job}: done" in log


def test_a_job_that_is_stopped_while_it_starts_is_queued_again(
    cluster: Cluster, dataset: tuple[str, ...], tmp_path: Path
) -> None:
    """Once while its ranks import, once while they build; nothing is saved by then."""
    run = tmp_path / "run"
    job = cluster.submit(*OVERRIDES, *dataset, *SHORT, output_directory=run)
    moments = {
        "importing": lambda: len(ranks_of(run)) >= 2,
        "building": lambda: len(ranks_of(run)) >= 2 and (run / LOCK_FILE).exists(),
    }
    for stops, (moment, is_there) in enumerate(moments.items(), start=1):
        cluster.wait(job, moment, is_there, seconds=300)
        assert not read(run, "train"), f"{moment}: too late for this test"
        cluster.call("scancel", "--signal=TERM", f"{job}.0")
        cluster.wait(
            job,
            "queued again",
            lambda stops=stops: cluster.facts(job).get("Restarts") == str(stops),
            seconds=180,
        )
    cluster.wait(
        job, "completed", lambda: cluster.facts(job)["JobState"] == "COMPLETED", seconds=300
    )
    log = cluster.log(job)
    assert log.count("stopped by a signal before the first step; back into the queue") == 2, log
    assert [record["step"] for record in read(run, "train")] == [1, 2, 3]


def test_a_failed_run_is_not_queued_again(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("training.steps=0", output_directory=tmp_path / "run")
    cluster.wait(job, "failed", lambda: cluster.facts(job)["JobState"] == "FAILED", seconds=180)
    assert cluster.facts(job)["Restarts"] == "0"
    log = cluster.log(job)
    assert "training.steps" in log
    assert "it is not queued again" in log


def test_a_rank_that_fails_while_others_start_is_no_signal(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Slurm ends the other rank by SIGTERM, which imports: its status is 143, the job's too."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\n[ "$SLURM_PROCID" != 1 ] || exit 2\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = cluster.submit(*OVERRIDES, output_directory=tmp_path / "run", venv=str(tmp_path))
    cluster.wait(job, "failed", lambda: cluster.facts(job)["JobState"] == "FAILED", seconds=180)
    log = cluster.log(job)
    assert cluster.facts(job)["Restarts"] == "0", log
    assert "the run failed with status 143; it is not queued again" in log


def test_a_cancelled_job_stays_cancelled(
    cluster: Cluster, dataset: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(*OVERRIDES, *dataset, "training.steps=100000", output_directory=run)
    cluster.wait(job, "at step 2", lambda: len(read(run, "train")) >= 2, seconds=300)
    cluster.call("scancel", job)
    cluster.wait(
        job, "cancelled", lambda: cluster.facts(job)["JobState"] == "CANCELLED", seconds=120
    )
    time.sleep(2)
    assert cluster.facts(job)["Restarts"] == "0", cluster.log(job)

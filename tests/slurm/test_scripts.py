"""The job scripts without Slurm: what they ask of srun, from where Slurm puts a copy of them.

`srun` and `scontrol` are small scripts here; `test_slurm.py` has the real ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.rules import check
from equilibrium_mcore.config.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" > "$NOTES/srun"
env > "$NOTES/environment"
for word in "$@"; do
  case "$word" in output_directory=*) folder="${word#*=}" ;; esac
done
echo '{"kind": "event", "event": "start"}' > "$folder/metrics.jsonl"
printf '%s' "${SRUN_SAYS:-}" >&2
exit "${SRUN_STATUS:-0}"
"""


@pytest.fixture
def job(tmp_path: Path):
    """Runs a copy of a script as Slurm does: elsewhere, in the folder of submission."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "scontrol").write_text("#!/usr/bin/env bash\necho node1\n")
    (programs / "sleep").write_text("#!/usr/bin/env bash\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    spool = tmp_path / "spool"
    spool.mkdir()

    def run(script: str, *words: str, submit: Path = ROOT, **variables: str):
        copy = shutil.copy(ROOT / "slurm" / script, spool / "slurm_script")
        kept = {k: v for k, v in os.environ.items() if k not in ("RUN_CONFIG", "OUTPUT_DIRECTORY")}
        job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(submit), "SLURM_NTASKS": "1"}
        job |= {"SLURM_JOB_NODELIST": "node1", "NOTES": str(tmp_path), "VENV": sys.prefix}
        path = f"{programs}:{os.environ['PATH']}"
        environment = {**kept, **job, "PATH": path, **variables}
        return subprocess.run(
            ["bash", str(copy), *words], cwd=submit, env=environment, capture_output=True, text=True
        )

    return run


def asked(tmp_path: Path) -> list[str]:
    """Words of srun from the program on."""
    words = (tmp_path / "srun").read_text().splitlines()
    return words[words.index("-m") :]


@pytest.mark.parametrize("script", ["train.sh", "pretrain_3b.sh"])
def test_a_run_of_any_stage_is_started(job, tmp_path, script):
    out = tmp_path / "out"
    config = "configs/experiments/sft_template.yaml"
    done = job(script, "training.epochs=3", RUN_CONFIG=config, OUTPUT_DIRECTORY=str(out))
    assert done.returncode == 0, done.stderr
    assert asked(tmp_path) == [
        *("-m", "equilibrium_mcore.train", config),
        *("training.epochs=3", f"output_directory={out}"),
    ]
    assert done.stdout.splitlines()[-1] == "job 7: done"


@pytest.mark.parametrize("stage", STAGES)
def test_what_the_ranks_are_given_is_the_run_of_every_stage(job, tmp_path, stage):
    """As eight ranks would read it."""
    out, config = tmp_path / "out", f"configs/runs/{stage}_3b.yaml"
    done = job("train.sh", "training.seed=5", RUN_CONFIG=config, OUTPUT_DIRECTORY=str(out))
    assert done.returncode == 0, done.stderr
    _, module, run, *changes = asked(tmp_path)
    read = load_run(ROOT / run, changes, world_size=8)
    assert module == "equilibrium_mcore.train" and read.stage == stage
    assert (read.output_directory, read.training.seed) == (out, 5)
    assert check(read, world_size=8) == []


def test_ranks_get_an_environment_for_gpus(job, tmp_path):
    """The allocator, and Triton's cache on the node's own disk; a user's own values stay."""
    out = f"output_directory={tmp_path / 'out'}"
    assert job("pretrain_3b.sh", out).returncode == 0
    found = dict(line.split("=", 1) for line in environment_of(tmp_path) if "=" in line)
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TRITON_CACHE_DIR"] == f"/tmp/triton_cache_{os.getuid()}_7"
    assert found["TRITON_CACHE_AUTOTUNING"] == "1"
    mine = {"TRITON_CACHE_DIR": "/local/mine", "PYTORCH_ALLOC_CONF": "backend:native"}
    assert job("pretrain_3b.sh", out, **mine).returncode == 0
    assert {f"{name}={value}" for name, value in mine.items()} <= set(environment_of(tmp_path))


def environment_of(tmp_path: Path) -> list[str]:
    return (tmp_path / "environment").read_text().splitlines()


def test_the_3b_has_its_defaults(job, tmp_path):
    out = tmp_path / "mine"
    done = job("pretrain_3b.sh", f"output_directory={out}")
    assert done.returncode == 0, done.stderr
    words = asked(tmp_path)
    assert words[2] == "configs/runs/pretrain_3b.yaml" and words[-1] == f"output_directory={out}"


@pytest.mark.parametrize("script", ["train.sh", "pretrain_3b.sh"])
def test_what_is_wrong_is_told_by_the_script_that_was_submitted(job, tmp_path, script):
    out = str(tmp_path / "out")
    failed = job(script, RUN_CONFIG="absent.yaml", OUTPUT_DIRECTORY=out)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"{script}: RUN_CONFIG=absent.yaml: no such file")
    away = job(script, submit=tmp_path, OUTPUT_DIRECTORY=out)
    assert away.returncode == 1 and "is not the repository: call sbatch there" in away.stderr
    outside = job(script, SLURM_JOB_ID="")
    assert f"{script}: this is a batch script: sbatch slurm/{script}" in outside.stderr
    config = "configs/runs/quickstart.yaml"
    failed = job(script, RUN_CONFIG=config, OUTPUT_DIRECTORY=out, SRUN_STATUS="3")
    assert failed.returncode == 1 and "the run failed with status 3" in failed.stderr


@pytest.mark.parametrize("script", ["train.sh", "pretrain_3b.sh"])
def test_a_signal_before_the_first_step_requeues(job, tmp_path, script):
    run = {"RUN_CONFIG": "configs/runs/quickstart.yaml", "OUTPUT_DIRECTORY": str(tmp_path / "out")}
    done = job(script, SRUN_STATUS="143", **run)
    assert done.returncode == 0, done.stderr
    assert "job 7: stopped by a signal before the first step; back into the queue" in done.stdout
    assert job(script, SRUN_STATUS="138", **run).returncode == 1


@pytest.mark.parametrize(
    "ended",
    ["task 1: Exited with exit code 2", "tasks 0-3,7: Killed", "task 1: Segmentation fault"],
)
def test_a_rank_that_fails_first_is_no_signal(job, tmp_path, ended):
    """Slurm ends the other ranks by the same signal, and their status is the highest."""
    run = {"RUN_CONFIG": "configs/runs/quickstart.yaml", "OUTPUT_DIRECTORY": str(tmp_path / "out")}
    others = "srun: error: node1: task 0: Terminated\n0: error: node1: task 9: no line of srun's\n"
    told = f"{others}srun: error: node1: {ended}"
    done = job("train.sh", SRUN_STATUS="143", SRUN_SAYS=told, **run)
    assert done.returncode == 1, done.stdout
    assert told in done.stderr and "it is not queued again" in done.stderr
    assert done.stderr.splitlines()[-1] == f"train.sh: srun: error: node1: {ended}"
    done = job("train.sh", SRUN_STATUS="143", SRUN_SAYS=others, **run)
    assert "back into the queue" in done.stdout


def test_train_needs_a_run_and_a_folder(job, tmp_path):
    assert "RUN_CONFIG is not set" in job("train.sh").stderr
    done = job("train.sh", RUN_CONFIG="configs/runs/quickstart.yaml")
    assert done.returncode == 1 and "OUTPUT_DIRECTORY is not set" in done.stderr


def test_both_ask_slurm_for_the_same_but_name_and_nodes():
    def options(script: str) -> set[str]:
        lines = (ROOT / "slurm" / script).read_text().splitlines()
        return {line for line in lines if line.startswith("#SBATCH")}

    differ = options("train.sh") ^ options("pretrain_3b.sh")
    assert differ == {
        *("#SBATCH --job-name=train", "#SBATCH --job-name=pretrain_3b"),
        *("#SBATCH --nodes=1", "#SBATCH --nodes=8"),
    }

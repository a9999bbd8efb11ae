"""tools/resume_training.py: the newest whole checkpoint, checked against the stored config."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.experiments.resume import as_text, find_to_resume, load_stored_run
from equilibrium_mcore.training.metrics import read_metrics
from tests.checkpoint.support import MODEL, flip
from tests.support.runs import tiny_run

ROOT = Path(__file__).parents[2]


def call(program: list[str], *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def resume_training(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return call([str(ROOT / "tools/resume_training.py")], *arguments, folder=folder)


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    """A run of 6 steps, saved at 2 and 4, where it stopped. Its original YAML is gone."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny_run(
        data,
        folder / "run",
        model=MODEL,
        training={"steps": 6, "stop_after_steps": 4},
        checkpoint={"save_interval_steps": 2, "keep_last": 5},
    )
    save_config(config, folder / "run.yaml")
    done = call(["-m", "equilibrium_mcore.train"], "run.yaml", folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "run.yaml").unlink()
    return folder / "run"


@pytest.fixture
def run_folder(stopped, here) -> Path:
    """A copy of it, in another place than where it was trained."""
    return Path(shutil.copytree(stopped, here / "copied"))


def data_file(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_it_resumes_to_the_end_without_the_original_file(run_folder, here):
    done = resume_training("copied", folder=here)
    assert done.returncode == 0, done.stderr
    assert "resumes copied/checkpoints/step_00000004 at step 4, up to step 6" in done.stdout
    train = [r["step"] for r in read_metrics(run_folder / "metrics.jsonl") if r["kind"] == "train"]
    assert train == [1, 2, 3, 4, 5, 6]
    assert "tools/resume_training.py copied" in (run_folder / "commands.txt").read_text()
    done = resume_training("copied", folder=here)
    assert done.returncode == 2 and "nothing is left to train" in done.stderr
    assert read_mapping(run_folder / "config.yaml")["training"]["steps"] == 6


def test_a_damaged_one_is_named_and_passed_over(run_folder, here):
    flip(data_file(run_folder / "checkpoints/step_00000004"))
    checked = resume_training("copied", "--check", folder=here)
    assert checked.returncode == 0, checked.stderr
    assert "passed over, damaged: copied/checkpoints/step_00000004: __0_" in checked.stdout
    assert "resumes copied/checkpoints/step_00000002 at step 2, up to step 6" in checked.stdout
    assert not (run_folder / "commands.txt").exists()  # it started nothing
    done = resume_training("copied", folder=here)
    assert done.returncode == 0, done.stderr
    events = [r for r in read_metrics(run_folder / "metrics.jsonl") if r["kind"] == "event"]
    assert any(r["event"] == "damaged" for r in events)
    assert any(r["event"] == "resume" and r["step"] == 2 for r in events)


def test_what_a_truncated_one_is_told_by_without_hashing(run_folder):
    target = data_file(run_folder / "checkpoints/step_00000004")
    target.write_bytes(target.read_bytes()[:-1])
    config = load_stored_run(run_folder)
    found = find_to_resume(config, verify=False)
    assert found.opened.path.name == "step_00000002"
    assert "step_00000004" in as_text(found, config)


def test_where_all_are_damaged_it_is_refused(run_folder):
    for step in (2, 4):
        flip(data_file(run_folder / f"checkpoints/step_{step:08d}"))
    with pytest.raises(ConfigError) as caught:
        find_to_resume(load_stored_run(run_folder), verify=True)
    assert "step_00000002" in str(caught.value) and "step_00000004" in str(caught.value)


def test_changes_that_may_be_and_that_may_not(run_folder):
    config = load_stored_run(run_folder, ["training.steps=9", "training.stop_after_steps=8"])
    assert (config.training.steps, config.training.stop_after_steps) == (9, 8)
    assert find_to_resume(config, verify=False).opened.facts["step"] == 4
    with pytest.raises(ConfigError, match=r"training\.seed=7 differs from the checkpoint's 1234"):
        find_to_resume(load_stored_run(run_folder, ["training.seed=7"]), verify=False)
    earlier = load_stored_run(run_folder, ["checkpoint.resume_step=2"])
    assert find_to_resume(earlier, verify=False).opened.facts["step"] == 2


def test_a_config_that_was_changed_by_hand_is_compared(run_folder):
    file = run_folder / "config.yaml"
    file.write_text(file.read_text().replace("seed: 1234", "seed: 99"))
    with pytest.raises(ConfigError, match=r"training\.seed=99 differs"):
        find_to_resume(load_stored_run(run_folder), verify=False)


def test_folders_with_nothing_to_resume(run_folder, here):
    (here / "empty").mkdir()
    for folder in (here / "empty", here / "absent"):
        with pytest.raises(ConfigError, match="holds no checkpoint, so there is nothing to resume"):
            load_stored_run(folder)
    with pytest.raises(ConfigError, match=r"is one checkpoint: .*resume_step=4"):
        load_stored_run(run_folder / "checkpoints/step_00000004")
    with pytest.raises(ConfigError, match=r"resumed where it is.*initial_weights"):
        load_stored_run(run_folder, ["output_directory=elsewhere"])
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=never finds nothing to resume"):
        find_to_resume(load_stored_run(run_folder, ["checkpoint.resume=never"]), verify=False)
    (run_folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml is not there.*step_00000004"):
        load_stored_run(run_folder)

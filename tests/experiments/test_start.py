"""tools/train.py: names to a checked run, its folder, and training itself at a tiny size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run, save_config
from equilibrium_mcore.config.yaml_io import parse_yaml, read_mapping, to_yaml
from equilibrium_mcore.experiments.start import ExperimentNames, load_named_run
from equilibrium_mcore.training.metrics import read_metrics
from tests.experiments.conftest import CONVERSATIONS
from tests.support.runs import tiny_run

ROOT = Path(__file__).parents[2]
MIXTURE = "pretrain/phase1/mixture1"


def names(**changes) -> ExperimentNames:
    values = {"stage": "pretrain", "phase": "phase1", "data_mixture": "mixture1"}
    values |= {"model_config": "llama/1b", "output_dir": Path("experiments/exp001")}
    return ExperimentNames(**{**values, "run_name": "mine", **changes})


def train(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_names_find_the_files(here, prepared):
    prepared("pretrain/phase1/mixture1")
    config = load_named_run(names())
    assert (config.name, config.stage, config.model.name) == ("mine", "pretrain", "llama_1b")
    assert config.output_directory == Path("experiments/exp001")
    assert config.tags == ["pretrain", "phase1", "mixture1", "llama/1b"]
    assert config.logging.wandb_run_name == "mine"
    assert config.optimizer.matrices == "adamw"  # the template's


def test_fine_tuning_starts_from_the_weights_with_their_model_and_tokenizer(prepared, weights):
    prepared("posttrain/sft/general", CONVERSATIONS)
    config = load_named_run(
        names(
            stage="sft",
            phase=None,
            data_mixture="general",
            model_config=None,
            initial_weights=weights,
        ),
        ["training.epochs=3"],
    )
    assert config.checkpoint.initial_weights == weights
    assert config.model.name == "trained_before"
    assert config.data.tokenizer.model == Path("tokenizer.model")
    assert (config.training.epochs, config.objective.type) == (3, "sft")


def test_a_place_and_an_experiment_of_ones_own(here, prepared):
    place = prepared("pretrain/phase2/mixture2", place=here / "elsewhere")
    own = here / "own.yaml"
    text = (ROOT / "configs/experiments/pretrain_template.yaml").read_text()
    own.write_text(text.replace("max_steps: 500_000", "max_steps: 7000"))
    named = names(phase="phase2", data_mixture="mixture2", prepared=place, experiment=own)
    config = load_named_run(named, ["training.batch_size=256"])
    assert (config.training.steps, config.training.micro_batch_size) == (7000, 2)
    assert config.tags == ["pretrain", "llama", "7b", "phase1"]  # the file's


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"phase": "phase9"}, "--phase phase9: stage pretrain has one of phase1, phase2"),
        ({"phase": None}, "stage pretrain has --phase phase1 --data_mixture mixture1, "),
        ({"stage": "sft", "phase": "phase1"}, "stage sft has none: leave it out"),
        ({"data_mixture": "absent"}, "--phase phase2 --data_mixture mixture2"),
        ({"model_config": "llama/9b"}, "llama/9b"),
        ({"data_mixture": "mixture3"}, "prepare_dataset.py pretrain/phase1/mixture3 --output"),
        ({"stage": "midtrain", "initial_weights": None}, "--initial_weights"),
        ({"experiment": ROOT / "configs/runs/quickstart.yaml"}, "no section `experiment`"),
        (
            {"stage": "sft", "phase": None, "data_mixture": MIXTURE},
            "is indexed, but stage 'sft'",
        ),
        (
            {"experiment": ROOT / "configs/experiments/sft_template.yaml"},
            "of stage sft: give",
        ),
    ],
)
def test_names_that_lead_nowhere(prepared, weights, changes, says):
    prepared("pretrain/phase1/mixture1")
    if changes.get("data_mixture") == MIXTURE:
        changes = {**changes, "initial_weights": weights}
    prepared("midtrain/phase1/mixture1")
    with pytest.raises(ConfigError) as caught:
        load_named_run(names(**changes))
    assert says in str(caught.value)


def test_the_help_has_both_spellings_and_check_writes_nothing(here, prepared):
    prepared("pretrain/phase1/mixture1")
    options = ["--stage", "pretrain", "--phase", "phase1", "--model-config", "llama/1b"]
    options += ["--data-mixture", "mixture1", "--output-dir", "exp", "--run-name", "a"]
    done = train(*options, "--check", "--host", "gpu", folder=here)
    assert done.returncode == 0, done.stderr
    assert "not on this host, and not checked" in done.stderr
    assert parse_yaml(done.stdout, source="")["training"]["micro_batch_size"] == 4
    assert not (here / "exp").exists()
    assert train(*options, "training.lr=1", folder=here).returncode == 2
    assert not (here / "exp").exists()


@pytest.fixture
def tiny(here, data, prepared) -> list[str]:
    """Options of tools/train.py for a run of seconds."""
    prepared("mine", {"type": "indexed", **data})
    (here / "mine.yaml").write_text("name: mine\nmetadata: {phase: pretrain}\ndatasets: []\n")
    (here / "data/mine/conversations.yaml").rename(here / "data/mine/blend.yaml")
    manifest = here / "data/mine/manifest.json"
    manifest.write_text(manifest.read_text().replace("conversations.yaml", "blend.yaml"))
    model = tiny_run(data, here / "unused", model={"layer_pattern": "M-"}).model
    (here / "tiny.yaml").write_text(to_yaml(model.model_dump(mode="json")))
    options = ["--stage", "pretrain", "--data_mixture", "./mine.yaml", "--model_config", "tiny"]
    settings = ["batch_size=4", "gradient_accumulation_steps=2", "max_steps=4", "world_size=1"]
    settings += ["warmup_steps=1", "mixed_precision=fp32", "sequence_length=64"]
    changes = [f"training.{setting}" for setting in settings]
    changes += ["logging.log_steps=1", "logging.eval_steps=2", "data.num_workers=0"]
    return [*options, "--output_dir", "exp/001", "--run_name", "tiny", *changes]


def test_a_run_by_names_trains_and_the_same_command_resumes(here, tiny):
    done = train(*tiny, "training.stop_after_steps=2", folder=here)
    assert done.returncode == 0, done.stderr
    folder = here / "exp/001"
    saved = load_run(folder / "config.yaml")
    assert (saved.training.steps, saved.training.micro_batch_size) == (4, 2)
    save_config(saved, here / "again.yaml")
    assert (here / "again.yaml").read_text() == (folder / "experiment.yaml").read_text()
    assert "training.stop_after_steps=2" in (folder / "commands.txt").read_text()
    done = train(*tiny, folder=here)
    assert done.returncode == 0, done.stderr
    assert (folder / "commands.txt").read_text().count("--run_name tiny") == 2
    assert read_mapping(folder / "config.yaml")["training"]["stop_after_steps"] is None
    steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4]

"""Experiment files: every key, what several say together, and errors in the file's keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from equilibrium_mcore.config import describe
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.experiment_keys import KEYS
from equilibrium_mcore.config.load import load_run, load_run_config, save_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.yaml_io import read_mapping
from tests.experiments.conftest import BLEND, CONVERSATIONS, PREFERENCES

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "configs" / "experiments"
# The template of the roadmap, word for word, but for what differs by name: `use_wandb`'s project.
ROADMAP = """\
experiment:
  name: "llama-7b-pretrain-phase1"
  description: "First pretraining phase with balanced mixture"
  tags: ["pretrain", "llama", "7b", "phase1"]
model:
  config_path: "configs/models/llama_7b.yaml"
  from_scratch: true
data:
  config_path: "configs/data/pretrain/phase1/mixture1.yaml"
  num_workers: 8
  prefetch_factor: 2
training:
  batch_size: 512
  gradient_accumulation_steps: 16
  max_steps: 500_000
  learning_rate: 3.0e-4
  warmup_steps: 2000
  lr_scheduler: "cosine"
  weight_decay: 0.1
  grad_clip: 1.0
  optimizer: "adamw"
  betas: [0.9, 0.95]
  eps: 1.0e-8
  mixed_precision: "bf16"
  use_ddp: true
  world_size: 8
checkpointing:
  save_steps: 1000
  save_total_limit: 5
  output_dir: "experiments/llama-7b-pretrain-phase1"
logging:
  log_steps: 10
  eval_steps: 500
  use_wandb: true
  wandb_project: "minimind-7b"
  wandb_run_name: "llama-7b-pretrain-phase1-mix1"
run:
  training: {sequence_length: 4096}
"""
WANTED = {
    "name": "llama-7b-pretrain-phase1",
    "description": "First pretraining phase with balanced mixture",
    "tags": ["pretrain", "llama", "7b", "phase1"],
    "model.name": "llama_7b",
    "checkpoint.initial_weights": None,
    "data.name": "blend",
    "data.num_workers": 8,
    "data.prefetch_factor": 2,
    "training.global_batch_size": 512,
    "training.micro_batch_size": 4,
    "training.steps": 500_000,
    "training.epochs": None,
    "training.sequence_length": 4096,
    "training.precision": "bf16",
    "training.validation_interval_steps": 500,
    "optimizer.matrices": "adamw",
    "optimizer.adamw.learning_rate": 3e-4,
    "optimizer.muon.learning_rate": 3e-4,
    "optimizer.adamw.weight_decay": 0.1,
    "optimizer.adamw.beta1": 0.9,
    "optimizer.adamw.beta2": 0.95,
    "optimizer.adamw.epsilon": 1e-8,
    "optimizer.schedule.warmup_steps": 2000,
    "optimizer.schedule.kind": "cosine",
    "optimizer.clip_gradient_norm": 1.0,
    "parallelism.world_size": 8,
    "checkpoint.save_interval_steps": 1000,
    "checkpoint.keep_last": 5,
    "output_directory": Path("experiments/llama-7b-pretrain-phase1"),
    "logging.interval_steps": 10,
    "logging.wandb_project": "minimind-7b",
    "logging.wandb_run_name": "llama-7b-pretrain-phase1-mix1",
}


def setting(config: RunConfig, key: str) -> object:
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.fixture
def roadmap(here: Path, prepared) -> Path:
    prepared("pretrain/phase1/mixture1")
    file = here / "experiment.yaml"
    file.write_text(ROADMAP)
    return file


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(file, overrides)
    return caught.value.problems


def edited(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def test_every_word_of_the_roadmap_is_a_setting(roadmap):
    config = load_run(roadmap)
    assert {key: setting(config, key) for key in WANTED} == WANTED
    told = {f"{s}.{w}" for s, keys in read_mapping(roadmap).items() for w in keys}
    assert {word for word in told if not word.startswith("run.")} <= KEYS.keys()


def test_the_document_has_every_word():
    document = describe.EXPERIMENTS_DOCUMENT.read_text(encoding="utf-8")
    assert describe.up_to_date(document, describe.describe_words) == document, (
        "docs/reference/experiment_files.md differs from the keys: run "
        "`python -m equilibrium_mcore.config.describe`"
    )
    assert all(f"| `{word}` |" in document for word in KEYS)


def test_settings_of_words_exist():
    for name, word in KEYS.items():
        for key in word.settings:
            section, _, inside = key.partition(".")
            assert section in RunConfig.model_fields, name
            part = RunConfig.model_fields[section].annotation
            for step in inside.split(".") if inside and section != "data" else ():
                part = part.model_fields[step].annotation


def test_the_effective_config_is_a_run_of_settings(roadmap, here):
    config = load_run(roadmap)
    save_config(config, here / "config.yaml")
    assert load_run(here / "config.yaml") == config


@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "distill", "dpo"])
def test_templates_are_whole(stage, here, prepared, weights):
    file = TEMPLATES / f"{stage}_template.yaml"
    mixture = read_mapping(file)["data"]["config_path"]
    name = mixture.removeprefix("configs/data/").removesuffix(".yaml")
    prepared(name, {"sft": CONVERSATIONS, "dpo": PREFERENCES}.get(stage, BLEND))
    overrides = [] if stage in ("pretrain", "distill") else [f"model.checkpoint_path={weights}"]
    config = load_run(file, overrides)
    assert config.stage == stage
    unread = read_mapping(file)
    assert unread.keys() == {*(word.partition(".")[0] for word in KEYS), "run"}


def test_the_main_reads_an_experiment_file(roadmap, capsys):
    with pytest.raises(SystemExit):
        load_run_config([str(roadmap), "--check", "training.max_steps=7000"])
    assert "steps: 7000" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- changes


def test_changes_are_words_or_settings(roadmap):
    config = load_run(
        roadmap,
        [
            "training.batch_size=64",
            "training.gradient_accumulation_steps=1",
            "parallelism.tensor=2",
            "optimizer.muon.learning_rate=0.02",
            "model=llama/1b",
            "model.attention.rope_base=5e5",
            "training.stop_after_steps=3",
            "logging.use_wandb=false",
        ],
    )
    assert config.training.micro_batch_size == 16  # 64 / (1 * 8 / 2)
    assert config.optimizer.muon.learning_rate == 0.02
    assert config.optimizer.adamw.learning_rate == 3e-4
    assert (config.model.name, config.model.attention.rope_base) == ("llama_1b", 5e5)
    assert config.logging.wandb_project is None


def test_run_refines_what_a_word_gives_to_several(roadmap):
    edited(roadmap, "run:\n", "run:\n  optimizer: {muon: {learning_rate: 0.01}}\n")
    config = load_run(roadmap)
    assert config.optimizer.muon.learning_rate == 0.01
    assert config.optimizer.soap.learning_rate == 3e-4


def test_run_reaches_into_the_model_and_the_data(roadmap):
    edited(roadmap, "run:\n", "run:\n  model: {vocab_size: 512}\n  data: {packing: documents}\n")
    config = load_run(roadmap)
    assert (config.model.name, config.model.vocab_size) == ("llama_7b", 512)
    assert (config.data.packing, config.data.num_workers) == ("documents", 8)


def test_ranks_of_a_launcher_count(roadmap):
    edited(roadmap, "  world_size: 8\n", "")
    assert load_run(roadmap, world_size=16).training.micro_batch_size == 2
    assert load_run(roadmap).training.micro_batch_size == 32


# ----------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  eps: ", "  epsilon: ", r"training\.epsilon: unknown key; did you mean 'eps'"),
        (
            "  eps: ",
            "  save_steps: ",
            r"training\.save_steps: .*'checkpointing\.save_steps'",
        ),
        ("  eps: ", "  seed: ", r"training\.seed: not a key.*below run: training: \{seed"),
        ("logging:", "loging:", r"loging: unknown section; did you mean 'logging'"),
        ("betas: [0.9, 0.95]", "betas: 0.9", r"training\.betas=0\.9: must be two numbers"),
        ('"cosine"', '"linear"', r"must be one of .*\(written as training\.lr_scheduler\)"),
        ("max_steps: 500_000", "max_steps: 0", r"training\.steps=0.*as training\.max_steps"),
        (
            "max_steps:",
            "epochs: 1\n  max_steps:",
            r"steps=500000 and .*epochs=1: .*\.max_steps",
        ),
        ("use_ddp: true", "use_ddp: false", r"use_ddp=false, but training\.world_size=8"),
        ("use_ddp: true", "use_ddp: yes", r"training\.use_ddp='yes': must be true or false"),
        ("from_scratch: true", "from_scratch: false", r"no model\.checkpoint_path"),
        ("true\ndata", "true\n  checkpoint_path: x\ndata", r"from_scratch=true, but .*'x'"),
        ('  wandb_project: "minimind-7b"\n', "", r"use_wandb=true, but logging\.wandb_project"),
        ("accumulation_steps: 16", "accumulation_steps: 0", r"must be a whole number above 0"),
        ("run:\n", "run:\n  name: other\n", r"run\.name='other': experiment\.name gives"),
        (
            "accumulation_steps: 16",
            "accumulation_steps: 24",
            r"batch_size=512 is not a multiple of gradient_accumulation_steps=24 \* 8 .* = 192 "
            r".*batch_size=384 or 576, or .*one of 1, 2, 4, 8, 16, 32, 64",
        ),
        (
            "run:\n  training: {",
            "run:\n  training: {micro_batch_size: 3, ",
            r"512 / \(gradient_accumulation_steps=16 \* 8 .*\) = 4 .*micro_batch_size=3",
        ),
    ],
)
def test_what_is_wrong_is_told_in_the_files_words(roadmap, old, new, says):
    problem, *_ = problems_of(edited(roadmap, old, new))
    assert re.search(says, problem), problem


def test_all_problems_at_once(roadmap):
    edited(roadmap, "  eps: ", "  epsilon: ")
    edited(roadmap, '"cosine"', '"linear"')
    problems = problems_of(roadmap, "training.gradient_accumulation_steps=24")
    assert len(problems) == 3


# ----------------------------------------------------------------------------------- the data


def test_a_mixture_that_was_not_prepared_gives_the_command(roadmap, here):
    (here / "data/pretrain/phase1/mixture1/manifest.json").unlink()
    (problem,) = problems_of(roadmap)
    place = "data/pretrain/phase1/mixture1"
    command = f"python tools/prepare_dataset.py pretrain/phase1/mixture1 --output {place}"
    assert command in problem


def test_a_mixture_without_tokenizer_gives_the_options_that_name_one(here, roadmap):
    (here / "mine.yaml").write_text("metadata: {phase: pretrain}\ndatasets: []\n")
    (problem,) = problems_of(roadmap, "data=mine.yaml")
    assert "prepare_dataset.py mine.yaml --output data/mine --tokenizer-type" in problem


def test_a_prepared_folder_of_another_mixture_is_refused(roadmap, prepared, here):
    other = prepared("pretrain/phase2/mixture1")
    (problem,) = problems_of(roadmap, f"data.prepared={other}")
    assert "'pretrain_phase2_mixture1', not 'pretrain_phase1_mixture1'" in problem


def test_a_mixture_prepared_elsewhere_and_a_blend_itself(roadmap, prepared, here):
    (here / "data/pretrain/phase1/mixture1/manifest.json").unlink()
    place = prepared("pretrain/phase1/mixture1", place=here / "elsewhere")
    by_place = load_run(roadmap, [f"data.prepared={place}"])
    assert load_run(roadmap, [f"data={place}/blend.yaml"]).data == by_place.data


def test_a_curriculum_and_a_phase_without_data_are_told(roadmap, prepared, here):
    stages = ["blend_stage1.yaml", "blend_stage2.yaml"]
    place = prepared("pretrain/phase1/mixture1", place=here / "a", blends=stages)
    (problem,) = problems_of(roadmap, f"data.prepared={place}")
    assert "curriculum of 2 stages" in problem and "a/blend_stage2.yaml" in problem
    place = prepared("pretrain/phase1/mixture1", place=here / "b", blends=[], phase="posttrain_dpo")
    (problem,) = problems_of(roadmap, f"data.prepared={place}")
    assert "'posttrain_dpo'" in problem and "--overwrite" in problem


def test_conversations_take_the_tokenizer_and_the_model_of_the_weights(here, prepared, weights):
    prepared("posttrain/sft/general", CONVERSATIONS)
    file = TEMPLATES / "sft_template.yaml"
    config = load_run(file, [f"model.checkpoint_path={weights}", "model.config_path=null"])
    assert config.data.tokenizer.model == Path("tokenizer.model")
    assert config.model.name == "trained_before"
    problems = problems_of(file, "model.checkpoint_path=absent")
    assert any("absent/config.yaml is not there" in problem for problem in problems)

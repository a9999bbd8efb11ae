"""A wheel holds all that a command needs, and works where the repository is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.support.made_up_text import made_up_code

ROOT = Path(__file__).parents[2]
SOURCES = ("equilibrium_mcore", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PATIENCE_SECONDS = 600  # for a hang alone

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of a source distribution, as `python -m build` does, from a copy of the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (copy / "dist").glob("*.whl")
    return path


def test_every_module_every_config_and_the_modelling_code_are_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "equilibrium_mcore").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    configs = {
        f"equilibrium_mcore/_configs/{path.relative_to(ROOT / 'configs')}"
        for path in (ROOT / "configs").rglob("*")
        if path.is_file()
    }
    assert "equilibrium_mcore/hugging_face/model_code/modeling_equilibrium.py" in package
    assert "equilibrium_mcore/_configs/models/equilibrium_tiny.yaml" in configs
    assert package | configs == {name for name in names if ".dist-info/" not in name}


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name.partition(".dist-info/")[2]: name for name in file.namelist()}
        about = message_from_bytes(file.read(names["METADATA"]))
        script = file.read(names["entry_points.txt"]).decode()
        licence = file.read(names["licenses/LICENSE"])
    assert about["License-Expression"] == "Apache-2.0" and about["Requires-Python"] == ">=3.12"
    assert "equilibrium-mcore = equilibrium_mcore.cli.__main__:main" in script
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert licence.lstrip().startswith(b"Apache License") and len(licence) > 11_000


# ------------------------------------------------------------------- installed, and no repository


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Command:
    """`equilibrium-mcore` of a new environment, in an empty folder, with tested packages.

    Of the environment of the tests the packages are seen, not the editable install: its hook is in
    a .pth file, which is read in an environment's own folder alone.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place / "venv", with_pip=True)
    python = place / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", wheel], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = place / "venv" / "lib" / version / "site-packages"
    (packages / "tested_packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    empty = place / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    asked = [python, "-c", "import equilibrium_mcore; print(equilibrium_mcore.__file__)"]
    found = subprocess.check_output(asked, cwd=empty, env=environment, text=True)
    assert Path(found).is_relative_to(packages), found

    def call(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [place / "venv" / "bin" / "equilibrium-mcore", *map(str, words)],
            cwd=empty, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    call.folder = empty
    return call


RUN = """\
name: smoke
model: equilibrium_tiny
data:
  name: made_up
  tokenizer: {type: SentencePieceTokenizer, model: tokenizer.model}
  sources: [{name: words, prefix: words_text_document, weight: 1.0}]
  split: "90,10,0"
parallelism: {world_size: 2, tensor: 2, sequence: true}
training:
  sequence_length: 64
  micro_batch_size: 2
  global_batch_size: 4
  steps: 2
  validation_interval_steps: 0
optimizer: {schedule: {warmup_steps: 1}}
logging: {interval_steps: 1, tensorboard: false}
output_directory: run
"""


@pytest.mark.slow
def test_commands_work_outside_of_the_repository(installed):
    folder = installed.folder
    assert "preprocess" in installed("--help").stdout
    assert "3,004,048" in installed("count", "equilibrium_tiny").stdout
    # A file of the project is found by its name, and what a message names is there.
    told = installed("run", "configs/runs/quickstart.yaml", "--check", "--host", "gpu").stdout
    assert "name: quickstart" in told
    missing = installed("plot", "nothing", status=1).stderr
    assert "equilibrium-mcore run RUN.yaml" in missing and "tools/" not in missing

    lines = [json.dumps({"text": text}) for text in made_up_code(400)]
    (folder / "words.jsonl").write_text("\n".join(lines) + "\n")
    installed(
        "tokenizer", "--input", "words.jsonl", "--output", "tokenizer.model", "--vocab-size", 512
    )
    installed(
        "preprocess", "--input", "words.jsonl", "--output-prefix", "words", "--append-eod",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "tokenizer.model",
    )  # fmt: skip
    (folder / "run.yaml").write_text(RUN)
    installed("run", "run.yaml")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2]
    installed("verify", "run")
    done = installed("convert", "--checkpoint", "run", "--output", "exported", "--verify")
    assert "verified: logits differ" in done.stdout
    assert (folder / "exported" / "modeling_equilibrium.py").is_file()


MIXTURE = """\
name: mine
metadata: {phase: pretrain, total_tokens: 20000}
tokenizer: {type: SentencePieceTokenizer, model: tokenizer.model}
datasets: [{name: words, source: words.jsonl, mix_ratio: 1.0, max_epochs: 9}]
"""
PIPELINE = """\
name: small
folder: out
variables: {model: equilibrium_tiny}
steps:
  - name: prepare
    command: [tools/prepare_dataset.py, mine.yaml, "--output=${prepare.data}"]
    inputs: [words.jsonl]
    outputs: {data: "${folder}/data"}
  - name: train
    command:
      - tools/train.py
      - --stage=pretrain
      - --data_mixture=./mine.yaml
      - --prepared=${prepare.data}
      - --model_config=${model}
      - --output_dir=${train.run}
      - --run_name=small
      - training.batch_size=2
      - training.gradient_accumulation_steps=1
      - training.max_steps=2
      - training.world_size=2
      - training.warmup_steps=1
      - training.mixed_precision=fp32
      - training.sequence_length=64
      - logging.eval_steps=0
    inputs: ["${prepare.data}"]
    outputs: {run: "${folder}/run"}
"""


@pytest.mark.slow
def test_a_pipeline_of_tools_runs_where_there_are_no_tools(installed):
    folder = installed.folder
    if not (folder / "tokenizer.model").is_file():
        lines = [json.dumps({"text": text}) for text in made_up_code(400)]
        (folder / "words.jsonl").write_text("\n".join(lines) + "\n")
        vocabulary = ("--output", "tokenizer.model", "--vocab-size", 512)
        installed("tokenizer", "--input", "words.jsonl", *vocabulary)
    (folder / "mine.yaml").write_text(MIXTURE)
    (folder / "small.yaml").write_text(PIPELINE)
    done = installed("pipeline", "small.yaml")
    assert "python -m equilibrium_mcore.cli prepare mine.yaml" in done.stdout
    commands = (folder / "out" / "run" / "commands.txt").read_text()
    assert "python -m equilibrium_mcore.cli train --stage=pretrain" in commands
    assert "unchanged" in installed("pipeline", "small.yaml").stdout

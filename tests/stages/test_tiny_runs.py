"""The runs in `configs/runs/tiny`, as a user has them, from weights as the quickstart makes.

All of them work in one folder, on a stand-in of the quickstart's model that is trained once.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.cli.command import run_subcommand
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.rules import check
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.stages import STAGES
from equilibrium_mcore.config.yaml_io import to_yaml
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.train import check_without_starting
from tests.data.chat.support import messages_of, random_chats, write_rows
from tests.stages.online_support import records, stage_rank
from tests.stages.test_preferences import pairs
from tests.support.pool import RankPool
from tests.support.runs import VOCABULARY, make_data, train_steps

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "configs/runs"
SMALLER = [f"model.vocab_size={VOCABULARY}", "logging.tensorboard=false"]
STEPS = 3
# Runs whose files name what another tiny run leaves.
AFTER: Mapping[str, tuple[str, ...]] = {"rlaif": ("reward_model",)}
CHANGES = {"midtrain": ["optimizer.schedule.decay_steps=2"]}


def in_folder(rank_info: RankInfo, folder: Path, config: RunConfig) -> None:
    """The run, whose paths are relative, in a rank."""
    os.chdir(folder)
    stage_rank(rank_info, config)


class Workplace:
    """A folder with `runs/quickstart`, `runs/chat` and the data of every stage."""

    def __init__(self, folder: Path, ranks: RankPool) -> None:
        self.folder, self.ranks = folder, ranks
        self.done: set[str] = set()

    def train(self, name: str) -> RunConfig:
        """The tiny run, checked and trained as its file says, and those that it needs before it."""
        config = self.config(name)
        if name not in self.done:
            for before in AFTER.get(name, ()):
                self.train(before)
            os.chdir(self.folder)
            check_without_starting(config)
            self.ranks.run(config.parallelism.world_size, in_folder, self.folder, config)
            self.done.add(name)
        return config

    def config(self, name: str) -> RunConfig:
        """With fewer steps and a smaller vocabulary."""
        few = [f"training.steps={STEPS}", *CHANGES.get(name, [])]
        if STAGES[name].data != "prompts":
            few += [f"training.validation_interval_steps={STEPS}", "training.validation_batches=1"]
        return load_run(RUNS / f"tiny/{name}.yaml", [*SMALLER, *few])

    def call(self, *arguments: str) -> str:
        """A command of the repository; what it said."""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def workplace(ranks, tmp_path_factory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("work"), ranks)
    quickstart = place.folder / "runs/quickstart"
    make_text(quickstart)
    train_weights(ranks, quickstart, quickstart / "run", seed=0)
    train_weights(ranks, quickstart, place.folder / "runs/chat/run", seed=1)  # opd's teacher
    chats = [{"messages": messages_of(turns)} for turns in random_chats(60, seed=3)]
    random.Random(0).shuffle(chats)
    for name, rows in {"chat": chats, "dpo": pairs(80, 1)}.items():
        data = place.folder / f"runs/{name}/data"
        data.mkdir(parents=True)
        write_rows(data / "train.jsonl", rows[10:])
        write_rows(data / "validation.jsonl", rows[:10])
    place.call(str(ROOT / "examples/arithmetic.py"), "--output-directory", "runs/tiny/data")
    return place


def make_text(quickstart: Path) -> None:
    """Two small sources and a tokenizer, under the names of the quickstart's."""
    data = quickstart / "data"
    (quickstart / "tokenizer").mkdir(parents=True)
    data.mkdir()
    sources = make_data(data)["sources"]
    (data / "tokenizer.model").rename(quickstart / "tokenizer/tokenizer.model")
    for source, name in zip(sources, ("code", "prose"), strict=True):
        for path in data.glob(f"{Path(source['prefix']).name}.*"):
            path.rename(path.with_name(f"{name}_text_document{path.suffix}"))


def train_weights(ranks: RankPool, quickstart: Path, output: Path, *, seed: int) -> None:
    """Two steps of the quickstart's run."""
    changes = [
        f"output_directory={output}",
        f"training.seed={seed}",
        f"data.tokenizer.model={quickstart}/tokenizer/tokenizer.model",
        f"data.sources.0.prefix={quickstart}/data/code_text_document",
        f"data.sources.1.prefix={quickstart}/data/prose_text_document",
        "parallelism={world_size: 1}",
        "training.global_batch_size=4",
    ]
    config = load_run(RUNS / "quickstart.yaml", [*SMALLER, *changes])
    ranks.run(1, train_steps, config, 2, True)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes the folder changes it for one test."""
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_tiny_run_trains_and_is_measured(workplace, name):
    config = workplace.train(name)
    output = workplace.folder / config.output_directory
    trained = records(output)
    assert len(trained) == STEPS
    assert records(output, "event")[-1]["event"] == "end"
    if STAGES[name].data != "prompts":
        assert records(output, "validation")
        return
    assert (output / "samples.jsonl").stat().st_size
    assert bool(records(output, "evaluation")) == bool(config.evaluation.interval_steps)


@pytest.mark.slow
def test_curves_of_answers_are_drawn(workplace):
    output = workplace.folder / workplace.train("grpo").output_directory
    run_subcommand("plot", [str(output)], program="plot")
    assert (output / "curves.png").stat().st_size


def prompts_mixture(folder: Path) -> Path:
    """GSM8K- and MATH-like problems, one of them without a truth in its place, as a mixture."""
    sums = [{"q": f"{n} plus 1?", "a": f"{n} + 1 is\n#### {n + 1}"} for n in range(29)]
    sums.append({"q": "What?", "a": "Nothing."})
    halves = [
        {"p": f"Half of ${n}$?", "s": rf"It is $\boxed{{\frac{{{n}}}{{2}}}}$."} for n in range(30)
    ]
    columns: dict[str, Any] = {
        "sums": {"prompt": "q", "truth": "a", "truth_place": "hash"},
        "halves": {"prompt": "p", "truth": "s", "truth_place": "boxed"},
    }
    datasets = []
    for name, rows in {"sums": sums, "halves": halves}.items():
        source = write_rows(folder / f"{name}.jsonl", rows)
        dataset = {"name": name, "source": str(source), "mix_ratio": 0.5}
        datasets.append({**dataset, "columns": columns[name]})
    mixture = {
        "metadata": {"phase": "posttrain_grpo"},
        "datasets": datasets,
        "validation": {"ratio": 0.1},
    }
    path = folder / "problems.yaml"
    path.write_text(to_yaml(mixture), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_mixture_of_problems_is_prepared_and_trained_on(workplace, tmp_path):
    """By the commands of the guides: prepare, check, train."""
    mixture = prompts_mixture(tmp_path)
    prepared = tmp_path / "prepared"
    workplace.call(str(ROOT / "tools/prepare_dataset.py"), str(mixture), f"--output={prepared}")
    train = ["-m", "equilibrium_mcore.train", str(RUNS / "tiny/grpo.yaml"), *SMALLER]
    train += [
        f"data={prepared / 'prompts.yaml'}",
        "data.template=plain",
        "data.tokenizer.type=SentencePieceTokenizer",
        "data.tokenizer.model=runs/quickstart/tokenizer/tokenizer.model",
        "data.document_multiple=4",
        "rewards=[{type: math_answer, latex: own}]",
        "training.steps=2",
        f"output_directory={tmp_path / 'run'}",
    ]
    assert "stage: grpo" in workplace.call(*train, "--check")
    workplace.call(*train)
    assert len(records(tmp_path / "run")) == 2 and records(tmp_path / "run", "evaluation")
    lines = (tmp_path / "run/samples.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {json.loads(line)["prompt"] for line in lines}
    assert asked and all("plus 1?" in prompt or "Half of" in prompt for prompt in asked)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_tiny_run_and_one_at_scale(stage):
    tiny, large = (
        load_run(RUNS / f"tiny/{stage}.yaml"),
        load_run(RUNS / f"{stage}_3b.yaml", world_size=8),
    )
    assert tiny.stage == large.stage == stage
    assert check(tiny) == [] and check(large, world_size=8) == []
    assert large.model.name.startswith("equilibrium_3b")
    assert tiny.name == f"tiny_{stage}" and large.name == f"{stage}_3b"
    if STAGES[stage].needs_weights:
        assert tiny.checkpoint.initial_weights == Path("runs/quickstart/run")

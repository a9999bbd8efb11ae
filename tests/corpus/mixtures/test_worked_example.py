"""The worked example of docs/guides/DATASET_MIXING_GUIDE.md, command by command."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from equilibrium_mcore.corpus.mixtures.manifest import read_mixture_manifest


@pytest.fixture
def workplace(tmp_path, repository):
    """An empty folder from which the repository's files have their usual paths."""
    for name in ("tools", "examples", "configs", "equilibrium_mcore"):
        (tmp_path / name).symlink_to(repository / name)
    return tmp_path


def commands(repository) -> list[list[str]]:
    text = (repository / "docs/guides/DATASET_MIXING_GUIDE.md").read_text(encoding="utf-8")
    block = re.search(r"^## A worked example$.*?^```bash\n(.*?)^```", text, re.M | re.S)[1]
    return [shlex.split(line) for line in block.splitlines()]


def call(words: list[str], folder) -> str:
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_worked_example_works(workplace, repository):
    printed = [call(words, workplace) for words in commands(repository)]
    _, _, plan, summary, report, config = printed
    assert "nothing was prepared" in plan and "420,000" in plan
    assert "train with data: runs/mixture/prepared/blend.yaml" in summary
    assert "## Kept and dropped" in report
    assert "runs/mixture/prepared/data/code_text_document" in config
    manifest = read_mixture_manifest(workplace / "runs/mixture/prepared")
    for source, share in zip(manifest.datasets, (0.7, 0.3), strict=True):
        assert source.share == share and source.validation_tokens > 0
        assert 0.5 < source.epochs <= 4
    assert (workplace / "runs/mixture/report/lengths.png").is_file()
    assert not list(workplace.glob("runs/**/*.partial"))


@pytest.mark.slow
def test_a_run_trains_on_the_example(workplace, repository):
    *first, check = commands(repository)
    for words in first:
        call(words, workplace)
    words = [word for word in check if word != "--check"]
    call([*words, "training.stop_after_steps=2"], workplace)
    assert (workplace / "runs/mixture/run/metrics.jsonl").is_file()


def test_the_tool_says_what_is_wrong(workplace):
    tool = [sys.executable, "tools/prepare_dataset.py"]
    for words, message in [
        (["examples/stdlib", "--output", "out", "--total-tokens", "much"], "--total-tokens much"),
        (["examples/stdlib", "--output", "out", "datasets.0.mix_ratio=0.6"], "must sum to 1"),
        (["examples/stdlib", "--output", "out", "--sample", "0"], "at least 1 row"),
        (["examples/stdlib", "--output", "out"], "tokenizer file runs/mixture/tokenizer.model"),
        (["posttrain/sft/none", "--output", "out"], "no such file"),
    ]:
        done = subprocess.run(
            [*tool, *words],
            cwd=workplace,
            env={**os.environ, "PYTHONPATH": str(workplace)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (workplace / "out").exists()

"""Hold a run's curve, number by number, against the same run by an earlier commit.

The quickstart's config (or another run on the CPU) is trained a few steps by this tree and by a
temporary checkout of REV, on the same data and with the same threads. Loss, balancing loss and
gradient norm of every step must be equal to the bit; the ratio of speeds is printed beside it.
With `--resume` REV trains the first half and this tree resumes its checkpoint. The status is 1
when they differ.

Examples:
    python tools/bench/curve.py --against HEAD~1
    python tools/bench/curve.py --against v0.1 --steps 20 --resume
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("loss", "aux_loss", "gradient_norm", "learning_rate", "tokens")
# The quickstart at a size that two cores train in a minute, with a line for every step.
SMALL = (
    "model.vocab_size=1024",
    "training.sequence_length=128",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    "training.validation_interval_steps=0",
    "checkpoint.save_interval_steps=0",
    "optimizer.schedule.warmup_steps=2",
    "logging.interval_steps=1",
    "logging.tensorboard=false",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The earlier commit, and the run."""
    add = parser.add_argument
    add("--against", required=True, metavar="REV", help="the earlier commit")
    add("--steps", type=int, default=20, help="of the run (20)")
    add("--resume", action="store_true", help="REV trains the first half, this tree the second")
    add("overrides", nargs="*", metavar="key=value", help="settings, for both")


def run(options: argparse.Namespace) -> int:
    """Make data, train with both trees, compare; 1 where they differ."""
    with tempfile.TemporaryDirectory(prefix="curve_") as temporary:
        folder = Path(temporary)
        before = folder / "tree"
        _call("git", "worktree", "add", "--quiet", "--detach", before, options.against)
        try:
            return _compare(folder, before, options)
        finally:
            _call("git", "worktree", "remove", "--force", before)


def _compare(folder: Path, before: Path, options: argparse.Namespace) -> int:
    settings = [*make_data(before, folder), *options.overrides, f"training.steps={options.steps}"]
    expected = _train(before, folder / "before", settings)
    if options.resume:
        half = f"training.stop_after_steps={options.steps // 2}"
        _train(before, folder / "now", [*settings, half])
    found = _train(ROOT, folder / "now", settings)
    apart = [
        f"step {old['step']}: {name} {new.get(name)!r}, before {old.get(name)!r}"
        for old, new in zip(expected, found, strict=True)
        for name in COMPARED
        if new.get(name) != old.get(name)
    ]
    what = "resumed from its checkpoint" if options.resume else "from the start"
    ratio = _speed(found[len(found) // 2 :]) / _speed(expected[len(expected) // 2 :])
    print(f"{len(found)} steps against {options.against}, {what}; tokens/s: {ratio:.2f} of before")
    if apart:
        print(f"NOT the same curve: {len(apart)} numbers differ, first {apart[0]}")
        return 1
    print(f"the same curve, to the bit: {', '.join(COMPARED)}")
    return 0


def make_data(tree: Path, folder: Path) -> list[str]:
    """Make what examples/quickstart.sh makes, smaller; the settings that name it.

    By the tools of `tree`, the earlier one: a later version reads what an earlier one wrote.
    """
    data, tokenizer = folder / "data", folder / "tokenizer.model"
    text = ("--output-directory", data, "--max-megabytes", "1.5")
    _python(tree, tree / "examples/stdlib_text.py", *text)
    texts = [data / "code.jsonl", data / "prose.jsonl"]
    trained = ("--input", *texts, "--output", tokenizer, "--vocab-size", 1024)
    _python(tree, tree / "tools/train_tokenizer.py", *trained)
    kind = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer)
    for text in texts:
        places = ("--input", text, "--output-prefix", text.with_suffix(""))
        _python(tree, tree / "tools/preprocess_data.py", *places, *kind, "--append-eod")
    return [
        *SMALL,
        f"data.tokenizer.model={tokenizer}",
        f"data.sources.0.prefix={data / 'code_text_document'}",
        f"data.sources.1.prefix={data / 'prose_text_document'}",
    ]


def _train(tree: Path, output: Path, settings: list[str]) -> list[dict]:
    """Train by the code of `tree`; the training records."""
    config = ROOT / "configs" / "runs" / "quickstart.yaml"
    _python(
        tree, "-m", "equilibrium_mcore.pretrain", config, f"output_directory={output}", *settings
    )
    return [record for record in read_metrics(output / METRICS_FILE) if record["kind"] == "train"]


def _speed(records: list[dict]) -> float:
    return statistics.median(record["tokens_per_second"] for record in records)


def _python(tree: Path, *arguments: object) -> None:
    _call(sys.executable, "-W", "ignore", *arguments, cwd=tree, PYTHONPATH=str(tree))


def _call(*words: object, cwd: Path = ROOT, **environment: str) -> None:
    """Run a command; print what it said and leave when it fails."""
    job = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if job.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{job.stdout[-2000:]}{job.stderr[-4000:]}")


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

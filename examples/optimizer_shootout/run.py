"""Train the same tiny hybrid with every optimizer at equal tokens, and compare.

Learning rates are swept on a small grid with the first seed; the best one is run with the other
seeds. Results: curves.png, table.md and results.json in the output folder. Finished runs are kept:
the same command goes on where it was, and --minutes bounds how long it works at a time.

Examples:
    python examples/optimizer_shootout/run.py --rehearse
    python examples/optimizer_shootout/run.py --steps 300 --seeds 3 --minutes 90
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(REPOSITORY)]

from results import RunResult, read_result, write_report  # noqa: E402
from variants import GRID, VARIANTS  # noqa: E402

RUN_FILE = "configs/runs/quickstart.yaml"
DATA = Path("runs/quickstart")  # what configs/data/quickstart.yaml names
REHEARSAL = [
    "model.layer_pattern=ME|+E",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
]


def make_data() -> None:
    """The quickstart's text, tokenizer and indexed data, where they are not there yet."""
    text, tokenizer = DATA / "text", DATA / "tokenizer" / "tokenizer.model"
    sources = ("code", "prose")
    done = [DATA / "data" / f"{name}_text_document.idx" for name in sources]
    if tokenizer.is_file() and all(path.is_file() for path in done):
        return
    inputs = [str(text / f"{name}.jsonl") for name in sources]
    if not all(Path(path).is_file() for path in inputs):
        python("examples/stdlib_text.py", "--output-directory", str(text))
    if not tokenizer.is_file():
        python("tools/train_tokenizer.py", "--input", *inputs, "--output", str(tokenizer),
               "--vocab-size", "4096")  # fmt: skip
    for name, path in zip(sources, inputs, strict=True):
        python("tools/preprocess_data.py", "--input", path, "--output-prefix",
               str(DATA / "data" / name), "--tokenizer-type", "SentencePieceTokenizer",
               "--tokenizer-model", str(tokenizer), "--append-eod")  # fmt: skip


def python(*arguments: str, log: Path | None = None) -> None:
    """Run Python in the repository; a failure ends the example with the log's end."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE if log else None,
        stderr=subprocess.STDOUT if log else None,
        text=True,
        check=False,
    )
    if log:
        log.write_text(done.stdout)
    if done.returncode:
        sys.exit(f"failed: python {' '.join(arguments)}\n{(done.stdout or '')[-3000:]}")


def train(output: Path, variant: str, rate: float, seed: int, options) -> RunResult | None:
    """The result of one run, made now where it is not there; None when there is no time left."""
    folder = output / variant / f"rate_{rate:g}" / f"seed_{seed}"
    known = read_result(folder, variant=variant, rate=rate, seed=seed, steps=options.steps)
    if known is not None or time.monotonic() > options.deadline:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{variant} at {rate:g}, seed {seed}", flush=True)
    python(
        "-m",
        "equilibrium_mcore.pretrain",
        RUN_FILE,
        f"output_directory={folder}",
        "parallelism={world_size: 1}",
        f"training.seed={seed}",
        f"training.steps={options.steps}",
        "training.sequence_length=128",
        "training.micro_batch_size=16",
        f"training.validation_interval_steps={max(1, options.steps // 10)}",
        "optimizer.adamw.learning_rates={}",
        f"optimizer.schedule.warmup_steps={max(1, options.steps // 10)}",
        "checkpoint.save_interval_steps=0",
        "logging={interval_steps: 1, tensorboard: false}",
        *VARIANTS[variant](rate),
        *(REHEARSAL if options.rehearse else []),
        log=folder / "log.txt",
    )
    return read_result(folder, variant=variant, rate=rate, seed=seed, steps=options.steps)


def main() -> int:
    """Parse the command line, train what is missing, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--seeds", type=int, default=2, help="seeds at the best rate; default 2")
    parser.add_argument("--minutes", type=float, default=60, help="start no run after so long")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("runs/optimizer_shootout"))
    parser.add_argument("--rehearse", action="store_true", help="6 steps of a smaller model")
    options = parser.parse_args()
    os.chdir(REPOSITORY)
    options.deadline = time.monotonic() + 60 * options.minutes
    if options.rehearse:
        options.steps = 6
    output = options.output / (f"steps_{options.steps}" + "_rehearsal" * options.rehearse)
    make_data()
    results = []
    for variant in options.only:
        sweep = [train(output, variant, rate, 1, options) for rate in GRID]
        results += [result for result in sweep if result is not None]
    for variant in options.only:  # other seeds once the sweeps are done
        sweep = [r for r in results if r.variant == variant]
        if len(sweep) == len(GRID):
            best = min(sweep, key=lambda r: r.final_loss).rate
            seeds = range(2, options.seeds + 1)
            more = [train(output, variant, best, seed, options) for seed in seeds]
            results += [result for result in more if result is not None]
    planned = len(options.only) * (len(GRID) + options.seeds - 1)
    print(write_report(results, output, steps=options.steps))
    if len(results) < planned:
        print(f"{len(results)} of {planned} runs are done: the same command goes on")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

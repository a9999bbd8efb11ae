"""Train the same tiny hybrid with every optimizer at equal tokens, and compare.

Learning rates are swept on a small grid with the first seed, extended where its highest rate is the
best; the best one is run with the other seeds. At the end the time of a step is measured for all
optimizers in turns, so that what else the machine did during the sweep does not count. Results:
curves.png, table.md and results.json in the output folder. Finished runs are kept: the same command
continues where it was, and --minutes limits how long it works at a time.

Examples:
    python examples/optimizer_shootout/run.py --rehearse
    python examples/optimizer_shootout/run.py --steps 300 --seeds 3 --minutes 90
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(REPOSITORY)]

from results import RunResult, best_rates, median_step_seconds, read_result, write_report  # noqa: E402
from variants import GRID, MORE_RATES, VARIANTS  # noqa: E402

from equilibrium_mcore.cli.command import run_command  # noqa: E402
from equilibrium_mcore.files.paths import user_path  # noqa: E402
from equilibrium_mcore.files.whole import write_whole  # noqa: E402

RUN_FILE = "configs/runs/quickstart.yaml"
DATA = Path("runs/quickstart")  # what configs/data/quickstart.yaml names
REHEARSAL = [
    "model.layer_pattern=ME|+E",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
]


def make_data() -> None:
    """The quickstart's text, tokenizer and indexed data, unless they exist."""
    text, tokenizer = DATA / "text", DATA / "tokenizer" / "tokenizer.model"
    sources = ("code", "prose")
    done = [DATA / "data" / f"{name}_text_document.idx" for name in sources]
    if tokenizer.is_file() and all(path.is_file() for path in done):
        return
    inputs = [str(text / f"{name}.jsonl") for name in sources]
    if not all(Path(path).is_file() for path in inputs):
        python("examples/stdlib_text.py", "--output-directory", str(text), "--overwrite")
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
        write_whole(log, done.stdout)
    if done.returncode:
        sys.exit(f"failed: python {' '.join(arguments)}\n{(done.stdout or '')[-3000:]}")


def run_folder(output: Path, variant: str, rate: float, seed: int) -> Path:
    """Where a run's files are."""
    return output / variant / f"rate_{rate:g}" / f"seed_{seed}"


def train(output: Path, variant: str, rate: float, seed: int, options) -> RunResult | None:
    """The result of one run, made now where it is not there; None when there is no time left."""
    folder = run_folder(output, variant, rate, seed)
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


def sweep(output: Path, variant: str, options) -> list[RunResult | None]:
    """The first seed at every rate of the grid, and at higher ones while the highest is best."""
    found = [train(output, variant, rate, 1, options) for rate in GRID]
    for _ in range(MORE_RATES):
        if None in found or min(found, key=lambda r: r.final_loss) is not found[-1]:
            break
        found.append(train(output, variant, 2 * found[-1].rate, 1, options))
    return found


TIMED_STEPS, TIMED_ROUNDS = 12, 2


def time_steps(output: Path, rates: dict[str, float], options) -> dict[str, float]:
    """Seconds per step of each variant: the lower median of rounds in which all take turns."""
    timing = argparse.Namespace(**{**vars(options), "steps": TIMED_STEPS, "deadline": math.inf})
    found: dict[str, list[float]] = {variant: [] for variant in rates}
    for number in range(1, TIMED_ROUNDS + 1):
        for variant, rate in rates.items():
            train(output / f"timing_{number}", variant, rate, 1, timing)
            folder = run_folder(output / f"timing_{number}", variant, rate, 1)
            found[variant].append(median_step_seconds(folder))
    return {variant: min(seconds) for variant, seconds in found.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which optimizers, how long, and where to."""
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--seeds", type=int, default=2, help="seeds at the best rate; default 2")
    parser.add_argument("--minutes", type=float, default=60, help="start no run after so long")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--no-timing", action="store_true", help="take the sweep's own times")
    parser.add_argument("--output", type=user_path, default=Path("runs/optimizer_shootout"))
    parser.add_argument("--rehearse", action="store_true", help="6 steps of a smaller model")


def run(options: argparse.Namespace) -> int:
    """Train what is missing, write the report; 1 where runs are missing still."""
    os.chdir(REPOSITORY)
    options.deadline = time.monotonic() + 60 * options.minutes
    if options.rehearse:
        options.steps = 6
    output = options.output / (f"steps_{options.steps}" + "_rehearsal" * options.rehearse)
    make_data()
    results, missing = [], 0
    for variant in options.only:
        found = sweep(output, variant, options)
        missing += found.count(None)
        results += [result for result in found if result is not None]
    if not missing:  # other seeds once the sweeps are done
        for variant, rate in best_rates(results).items():
            for seed in range(2, options.seeds + 1):
                result = train(output, variant, rate, seed, options)
                results += [] if result is None else [result]
                missing += result is None
    step_seconds = None
    if not options.no_timing and results:
        step_seconds = time_steps(output, best_rates(results), options)
    print(write_report(results, output, steps=options.steps, step_seconds=step_seconds))
    if missing:
        print(f"{len(results)} runs are done, and some are missing: the same command continues")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

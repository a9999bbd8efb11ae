"""GRPO against PPO, Dr. GRPO and SPO, at equal answers and equal tokens of updates.

A small hybrid that stops after the first addition of a sum of three learns to go on. Learning rates
are swept; three seeds, and a KL of 0 and of 0.01.

Each cell is a run folder with its whole settings in cell.yaml, trained by `python -m
equilibrium_mcore.train`. The same command goes on where it was: finished cells are kept, an
interrupted one continues from its checkpoint. At the end the table, results.json and curves.png
are written. Without --small every method, KL, rate and seed is a cell; with it three rates are
swept with the first seed at the first KL, and all else is done at the best rate of each method.

Examples:
    python examples/grpo_against_ppo/run.py --small --jobs 2
    python examples/grpo_against_ppo/run.py --small --rollouts 3 --start-steps 4 --methods grpo ppo
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(REPOSITORY)]

import sums  # noqa: E402
from cell_results import CELL_FILE, best_rates, is_finished, read_cells  # noqa: E402
from grid import METHODS, Cell, Grid, Sizes, settings, start_settings  # noqa: E402
from jobs import LOG_FILE, Job, work_off  # noqa: E402
from table import write_report  # noqa: E402

from equilibrium_mcore.cli.command import processes, run_command  # noqa: E402
from equilibrium_mcore.config.errors import ConfigError  # noqa: E402
from equilibrium_mcore.config.load import save_config  # noqa: E402
from equilibrium_mcore.config.schema import RunConfig  # noqa: E402
from equilibrium_mcore.config.yaml_io import read_mapping  # noqa: E402
from equilibrium_mcore.files.paths import user_path  # noqa: E402
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics  # noqa: E402

SMALL_RATES = (1e-4, 3e-4, 1e-3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cells, how long, how many at a time, and where to."""
    add, whole, sizes = parser.add_argument, Grid(), Sizes()
    add("--small", action="store_true", help="the sweep, then the best rate of each method")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add(
        "--rates",
        nargs="+",
        type=float,
        help=f"{_said(whole.rates)}; --small: {_said(SMALL_RATES)}",
    )
    add("--kl", nargs="+", type=float, default=list(whole.kls), help=_said(whole.kls))
    add("--seeds", nargs="+", type=int, default=list(whole.seeds), help=_said(whole.seeds))
    add("--rollouts", type=int, default=sizes.rollouts, help=f"of a cell ({sizes.rollouts})")
    add("--answers", type=int, default=sizes.answers, help=f"of a rollout ({sizes.answers})")
    add("--start-steps", type=int, help="of the fine-tuning that all start from (start.yaml)")
    add("--jobs", type=processes, default=1, help="cells that run at a time (1)")
    add("--output", type=user_path, default=Path("runs/grpo_against_ppo"), help="folder of it all")


def run(options: argparse.Namespace) -> int:
    """Make what is missing, in order; 1 where cells failed."""
    output = options.output.absolute()
    os.chdir(REPOSITORY)
    rates = options.rates or (SMALL_RATES if options.small else Grid().rates)
    grid = Grid(options.methods, options.kl, rates, options.seeds)
    sizes = Sizes(options.rollouts, options.answers)
    runs = {cell: settings(cell, sizes, output) for cell in grid.cells()}  # refused before all work
    make_start(output, options.start_steps)
    if options.small:
        failed = train(grid.sweep(), runs, options.jobs)
        if failed:
            return tell(output, failed)
        swept = set(grid.sweep())
        best = best_rates([r for r in read_cells(output)[0] if r.cell in swept])
        failed = train(grid.rest(best), runs, options.jobs)
    else:
        failed = train(grid.cells(), runs, options.jobs)
    python("examples/grpo_against_ppo/divergence.py", str(output))
    return tell(output, failed)


def make_start(output: Path, steps: int | None) -> None:
    """Data, tokenizer, and the model that all cells start from, unless they are there."""
    data, tokenizer, start = output / "data", output / "tokenizer.model", output / "start"
    if not (data / "text.jsonl").is_file():  # the last of its files
        print(sums.write_data(data), flush=True)
    if not tokenizer.is_file():
        python("tools/train_tokenizer.py", "--input", str(data / "text.jsonl"), "--output",
               str(tokenizer), "--vocab-size", "512")  # fmt: skip
    config = start_settings(output, steps)
    if not is_finished(start) or steps is not None:
        write_once(config, start / CELL_FILE)
    if not is_finished(start):
        print(f"fine-tuning: {start}", flush=True)
        work_off([train_job("start", start)], 1)
    if not is_finished(start):
        raise ValueError(f"{start}: the fine-tuning did not end; see {start / LOG_FILE}")


def train(cells: Sequence[Cell], runs: dict[Cell, RunConfig], jobs: int) -> list[Cell]:
    """Train what is not finished; the cells that failed."""
    wanted = []
    for cell in cells:
        folder = Path(runs[cell].output_directory)
        write_once(runs[cell], folder / CELL_FILE)
        if not is_finished(folder):
            wanted.append(train_job(str(cell), folder))
    print(f"{len(cells)} cells, {len(cells) - len(wanted)} of them finished already", flush=True)
    work_off(wanted, jobs, after=lambda job: print(line_of(job.folder), flush=True))
    return [cell for cell in cells if not is_finished(Path(runs[cell].output_directory))]


def train_job(name: str, folder: Path) -> Job:
    """The run of a folder's cell.yaml, as a user starts it."""
    command = [sys.executable, "-m", "equilibrium_mcore.train", str(folder / CELL_FILE)]
    return Job(name, folder, command)


def write_once(config: RunConfig, path: Path) -> None:
    """The whole settings; what stands there already must be the same.

    Raises ConfigError where it is not.
    """
    values = config.model_dump(mode="json")
    if path.is_file():
        before = read_mapping(path)
        if changed := sorted(key for key in values if before.get(key) != values[key]):
            raise ConfigError(
                f"{path}: was begun with other settings of {', '.join(changed)}; give the options "
                "of before, another --output, or remove that folder"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(config, path)


def line_of(folder: Path) -> str:
    """What came of a cell, for the terminal."""
    if not is_finished(folder):
        return f"    not finished: {folder / LOG_FILE}"
    records = read_metrics(folder / METRICS_FILE)
    said = [f"{100 * r['accuracy']:.0f}" for r in records if r["kind"] == "evaluation"]
    return f"    held-out accuracy {', '.join(said)} %" if said else "    finished"


def tell(output: Path, failed: Sequence[Cell]) -> int:
    """The table of what there is; 1 where cells failed."""
    results, unfinished = read_cells(output)
    if results:
        print(write_report(results, output, unfinished=unfinished))
    for cell in failed:
        print(f"failed: {cell}: {output / 'cells' / cell.place / LOG_FILE}", file=sys.stderr)
    return 1 if failed else 0


def python(*arguments: str) -> None:
    """A command of this project; its failure ends ours."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *arguments], env=environment, check=False)
    if done.returncode:
        raise ValueError(f"failed with status {done.returncode}: python {' '.join(arguments)}")


def _said(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

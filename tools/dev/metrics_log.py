"""Write the metric tables of docs/development_log.md from the logs of runs, keeping the best.

Examples:
    python tools/dev/metrics_log.py runs/quickstart/run
    python tools/dev/metrics_log.py runs/pretrain_3b runs/other --log docs/development_log.md
A run is a folder with metrics.jsonl and config.yaml. "Current" is of the latest of the runs (of one
day: the one named last), "best" of all of them and of what the log holds already; the date is when
the run's metrics.jsonl was last written. What no run logs yet stays "not run".
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from equilibrium_mcore.config.yaml_io import parse_yaml
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics

LOG = Path(__file__).resolve().parents[2] / "docs" / "development_log.md"
BEGIN, END = "<!-- metrics: written by tools/dev/metrics_log.py -->", "<!-- end of metrics -->"
PRETRAINED = ("pretrain", "midtrain")
NOT_RUN = "not run"
LAST_RECORDS = 10
GB_PER_GIB = 2**30 / 1e9


@dataclass(frozen=True)
class RunLog:
    """What a run's files say."""

    name: str
    date: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]


class Metric(NamedTuple):
    """A line of a table: the user's target, and how a run's figure is made; None: by no run yet."""

    name: str
    target: str
    of_run: Callable[[RunLog], float | None] | None = None
    best: Callable[..., float] = min
    digits: int = 2


def known(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The figures of a key, without those that are null or not there."""
    return [record[key] for record in records if record.get(key) is not None]


def training_loss(run: RunLog) -> float | None:
    losses = known(run.train[-LAST_RECORDS:], "loss")
    return statistics.mean(losses) if losses else None


def validation_perplexity(run: RunLog) -> float | None:
    return next(iter(known(run.validation[-1:], "perplexity")), None)


def throughput(run: RunLog) -> float | None:
    rates = known(run.train, "tokens_per_second")
    return statistics.median(rates) if rates else None


def memory_gb(run: RunLog) -> float | None:
    gib = max(known(run.train, "memory_gib"), default=None)
    return None if gib is None else gib * GB_PER_GIB


TABLES: dict[str, tuple[str, list[Metric]]] = {
    "Pretraining Metrics": (
        "Metric",
        [
            Metric("Training Loss", "< 2.5", training_loss, digits=3),
            Metric("Validation Perplexity", "< 15", validation_perplexity, digits=1),
            Metric("Throughput (tokens/sec)", "> 10000", throughput, max, 0),
            Metric("Memory Usage (GB)", "< 40", memory_gb),
        ],
    ),
    "Alignment Metrics": (
        "Metric",
        [
            Metric("Reward Model Score", "> 0.8"),
            Metric("Human Preference Win Rate", "> 70%"),
            Metric("KL Divergence from Base", "< 0.5"),
        ],
    ),
    "Evaluation Benchmarks": (
        "Benchmark",
        [
            Metric("AIME (Math)", "> 50%"),
            Metric("AIME 2025", "> 60%"),
            Metric("EconBench", "> 75%"),
            Metric("EconAgentBench", "> 80%"),
            Metric("Causal Reasoning", "> 70%"),
            Metric("SWE-bench Economic", "> 40%"),
            Metric("MMLU", "> 60%"),
            Metric("HumanEval (Code)", "> 40%"),
            Metric("TruthfulQA", "> 65%"),
        ],
    ),
}


def read_run(folder: Path) -> RunLog:
    """The log of a pretraining run; raises FileNotFoundError, ValueError where it is another."""
    path = folder / METRICS_FILE
    records = read_metrics(path)
    config = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), source=str(folder))
    if config.get("stage", PRETRAINED[0]) not in PRETRAINED:
        raise ValueError(f"{folder} is a run of the stage {config['stage']}, not of pretraining")
    train, validation = ([r for r in records if r["kind"] == k] for k in ("train", "validation"))
    if not train:
        raise ValueError(f"{path} holds no training record yet")
    date = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
    return RunLog(str(config["name"]), date, train, validation)


def tables(runs: Sequence[RunLog], written: str) -> str:
    """The tables as Markdown; `written` are those of before, whose best figures are kept."""
    parts = []
    for title, (first, metrics) in TABLES.items():
        head = f"### {title}\n\n| {first} | Target | Current | Best | Date |\n|---|---|---|---|---|"
        parts.append("\n".join([head, *(_row(metric, runs, written) for metric in metrics)]))
    return "\n\n".join(parts)


def _row(metric: Metric, runs: Sequence[RunLog], written: str) -> str:
    found = [(value, run.name, run.date) for run in runs if (value := _figure(metric, run))]
    current = max(reversed(found), key=lambda figure: figure[2], default=None)
    candidates = [*_best_before(metric, written), *found]
    best = metric.best(candidates, key=lambda figure: figure[0]) if candidates else None
    cells = [metric.name, metric.target, NOT_RUN, NOT_RUN, ""]
    if current is not None:
        cells[2], cells[4] = f"{current[0]:,.{metric.digits}f} ({current[1]})", current[2]
    if best is not None:
        cells[3] = f"{best[0]:,.{metric.digits}f} ({best[1]}, {best[2]})"
    return f"| {' | '.join(cells)} |"


def _figure(metric: Metric, run: RunLog) -> float | None:
    return metric.of_run(run) if metric.of_run is not None else None


def _best_before(metric: Metric, written: str) -> list[tuple[float, str, str]]:
    """The best figure that the log holds, with its run and date."""
    row = re.search(rf"^\| {re.escape(metric.name)} \|(.*)$", written, re.M)
    cell = row[1].split("|")[2].strip() if row else ""
    best = re.fullmatch(r"([\d,.]+) \((.+), (\d{4}-\d{2}-\d{2})\)", cell)
    return [(float(best[1].replace(",", "")), best[2], best[3])] if best else []


def updated(document: str, runs: Sequence[RunLog]) -> str:
    """The log with its tables rewritten. Raises ValueError when it lacks the markers."""
    head, begin, rest = document.partition(BEGIN)
    written, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the log must hold the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{tables(runs, written)}\n\n{END}{tail}"


def main() -> int:
    """Parse the command line, rewrite the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="its folder")
    parser.add_argument("--log", type=user_path, default=LOG, help="the document to rewrite")
    options = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in options.runs]
        text = updated(options.log.read_text(encoding="utf-8"), runs)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_whole(options.log, text)
    print(f"wrote {options.log}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

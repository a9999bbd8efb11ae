"""The comparison as a table, as JSON and as a picture, of whatever cells are finished.

Writes table.md, results.json and curves.png into the folder of the cells.

Example:
    python examples/grpo_against_ppo/table.py runs/grpo_against_ppo
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import numpy as np  # noqa: E402
from cell_results import CellResult, best_rates, read_cells  # noqa: E402
from grid import METHODS  # noqa: E402

from equilibrium_mcore.cli.command import run_command  # noqa: E402
from equilibrium_mcore.files.paths import user_path  # noqa: E402
from equilibrium_mcore.files.tables import markdown_table  # noqa: E402
from equilibrium_mcore.files.whole import write_whole  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = dict[tuple[str, float], list[CellResult]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of which cells."""
    parser.add_argument("output", type=user_path, help="the folder that run.py wrote")


def run(options: argparse.Namespace) -> int:
    """Read, write, print; 1 where nothing is finished."""
    results, unfinished = read_cells(options.output)
    if not results:
        print(f"{options.output}: no cell is finished: run examples/grpo_against_ppo/run.py")
        return 1
    print(write_report(results, options.output, unfinished=unfinished))
    return 0


def write_report(results: Sequence[CellResult], output: Path, *, unfinished: int = 0) -> str:
    """Write all three; the table."""
    plain = json.dumps([asdict(result) for result in results], indent=1) + "\n"
    write_whole(output / "results.json", plain)
    table = markdown(results, unfinished=unfinished)
    write_whole(output / "table.md", table + "\n")
    draw(results, output / "curves.png")
    return table


def rows_of(results: Sequence[CellResult]) -> Rows:
    """The cells at the best rate of their method, by method and KL."""
    best = best_rates(results)
    rows: Rows = {}
    for result in sorted(results, key=lambda r: (list(METHODS).index(r.method), r.kl, r.seed)):
        if result.rate == best[result.method]:
            rows.setdefault((result.method, result.kl), []).append(result)
    return rows


def markdown(results: Sequence[CellResult], *, unfinished: int = 0) -> str:
    """Accuracy at equal answers and at equal CPU time, cost, stability; and the sweep."""
    rows = rows_of(results)
    everyone = [cell for cells in rows.values() for cell in cells]
    answers = min(cell.answers[-1] for cell in everyone)
    seconds = min(cell.cpu_seconds[-1] for cell in everyone)
    columns: dict[str, Callable[[list[CellResult]], str]] = {
        "rate": lambda cells: f"{cells[0].rate:g}",
        "seeds": lambda cells: str(len(cells)),
        f"after {answers // 4:,} answers": _of(lambda c: 100 * c.at_answers(answers / 4), ".0f"),
        f"{answers // 2:,}": _of(lambda c: 100 * c.at_answers(answers / 2), ".0f"),
        "at the end": _of(lambda c: 100 * c.end, ".0f"),
        f"after {seconds:.0f} CPU-s": _of(lambda c: 100 * c.at_seconds(seconds), ".0f"),
        "collapsed": lambda cells: f"{sum(c.collapsed for c in cells)} of {len(cells)}",
        "CPU-s": _of(lambda c: c.cpu_seconds[-1], ".0f"),
        "tokens of updates": _of(lambda c: c.update_tokens / 1000, ".0f", "k"),
        "peak GiB": _of(lambda c: c.peak_gib, ".2f"),
        "state MiB": _of(lambda c: c.state_mib, ".1f"),
        "dead groups": _of(lambda c: c.dead_groups, ".2f"),
        "explained variance": _of(lambda c: c.explained_variance, ".2f"),
        "KL from the start": _of(lambda c: c.divergence, ".2f"),
    }
    cells = f"{len(results)} cells" + (
        f" ({unfinished} more are not finished)" if unfinished else ""
    )
    start = 100 * float(np.mean([result.accuracy[0] for result in results]))
    parts = [
        f"{cells}. Held-out accuracy in percent; {start:.0f} before any update. ± is half the "
        "range over the seeds.",
        markdown_table(
            ["method", "KL", *columns],
            [
                (m, f"{kl:g}", *(c(found) for c in columns.values()))
                for (m, kl), found in rows.items()
            ],
            align="lr",
        ),
        "The sweep: accuracy at the end, first seed and first KL.",
        _sweep(results),
    ]
    return "\n\n".join(parts)


def _of(
    value: Callable[[CellResult], float | None], form: str, unit: str = ""
) -> Callable[[list[CellResult]], str]:
    def text(cells: list[CellResult]) -> str:
        values = [found for cell in cells if (found := value(cell)) is not None]
        if not values:
            return "-"
        mean, half = format(np.mean(values), form), format((max(values) - min(values)) / 2, form)
        return f"{mean}{unit}" if len(values) == 1 or not float(half) else f"{mean} ± {half}{unit}"

    return text


def _sweep(results: Sequence[CellResult]) -> str:
    rates = sorted({result.rate for result in results})
    rows = []
    for method in (m for m in METHODS if any(r.method == m for r in results)):
        mine = [r for r in results if r.method == method]
        first = min((r.seed, r.kl) for r in mine)
        ends = {r.rate: f"{100 * r.end:.0f}" for r in mine if (r.seed, r.kl) == first}
        rows.append((method, *(ends.get(rate, "-") for rate in rates)))
    return markdown_table(("method", *(f"{rate:g}" for rate in rates)), rows, align="lr")


def draw(results: Sequence[CellResult], path: Path) -> None:
    """Accuracy against answers and against CPU time: means, with a band over the seeds."""
    from equilibrium_mcore.plots.figure import write_png

    write_png(path, lambda: _figure(rows_of(results)), dpi=110)


def _figure(rows: Rows) -> Figure:
    from matplotlib import pyplot as plt

    kls = sorted({kl for _, kl in rows})
    figure, axes = plt.subplots(
        len(kls), 2, figsize=(9, 3.1 * len(kls)), sharey=True, squeeze=False
    )
    for (by_answers, by_seconds), kl in zip(axes, kls, strict=True):
        for method, cells in ((m, cells) for (m, k), cells in rows.items() if k == kl):
            answers = np.array(cells[0].answers, float)
            seconds = [np.interp(answers, cell.answers, cell.cpu_seconds) for cell in cells]
            accuracy = np.array([[cell.at_answers(n) for n in answers] for cell in cells])
            label = f"{method}, rate {cells[0].rate:g}, seeds {len(cells)}"
            _line(by_answers, method, answers, accuracy, label)
            _line(by_seconds, method, np.mean(seconds, axis=0), accuracy, label)
        by_answers.set(title=f"KL {kl:g}", xlabel="answers drawn", ylabel="held-out accuracy")
        by_seconds.set(xlabel="CPU-seconds of training", ylim=(0, 1))
        by_answers.legend(loc="lower right")
    figure.tight_layout()
    return figure


def _line(axis: Axes, method: str, at: np.ndarray, accuracy: np.ndarray, label: str) -> None:
    """`accuracy` [cells, evaluations]: the mean, and a band from the least to the largest."""
    from equilibrium_mcore.plots.figure import colour_of

    colour = colour_of(list(METHODS).index(method))
    axis.plot(at, accuracy.mean(axis=0), color=colour, label=label)
    if len(accuracy) > 1:
        low, high = accuracy.min(axis=0), accuracy.max(axis=0)
        axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

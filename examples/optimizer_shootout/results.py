"""Reads finished runs, and writes the picture and the tables of the comparison."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from equilibrium_mcore.checkpoint.directory import latest_checkpoint
from equilibrium_mcore.checkpoint.safe_load import read_metadata
from equilibrium_mcore.files.tables import markdown_table
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class RunResult:
    """What one run did."""

    variant: str
    rate: float
    seed: int
    steps: list[int]  # of the validations
    loss: list[float]  # validation loss, nats per token; infinite where it diverged
    seconds: list[float]  # of training before each validation
    state_bytes_per_parameter: float

    @property
    def final_loss(self) -> float:
        return self.loss[-1]

    def loss_at(self, seconds: float) -> float:
        """Validation loss after so much training time, between validations by a straight line."""
        return float(np.interp(seconds, self.seconds, self.loss))


def read_result(
    folder: Path, *, variant: str, rate: float, seed: int, steps: int
) -> RunResult | None:
    """The result of a finished run; None where it is not finished."""
    path = folder / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    validations = {r["step"]: r["loss"] for r in records if r["kind"] == "validation"}
    if steps not in validations or latest_checkpoint(folder) is None:
        return None
    spent = {r["step"]: r["seconds_per_step"] for r in records if r["kind"] == "train"}
    at = sorted(validations)
    return RunResult(
        variant=variant,
        rate=rate,
        seed=seed,
        steps=at,
        loss=[math.inf if validations[s] is None else validations[s] for s in at],
        seconds=[sum(value for step, value in spent.items() if step <= s) for s in at],
        state_bytes_per_parameter=state_bytes_per_parameter(latest_checkpoint(folder)),
    )


def state_bytes_per_parameter(checkpoint: Path) -> float:
    """Bytes of optimizer state, whole, beside the weights of the model, for each parameter."""
    state = elements = 0
    metadata = read_metadata(checkpoint)
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if name.startswith("optimizer."):
            state += math.prod(entry.size) * entry.properties.dtype.itemsize
        elif entry.properties.dtype.is_floating_point:
            elements += math.prod(entry.size)
    return state / elements


def median_step_seconds(folder: Path) -> float:
    """Median seconds of a run's steps, without the first two, in which memory is found."""
    records = read_metrics(folder / METRICS_FILE)
    return float(np.median([r["seconds_per_step"] for r in records if r["kind"] == "train"][2:]))


def best_rates(results: list[RunResult]) -> dict[str, float]:
    """The rate of each variant with the lowest loss of the first seed."""
    return {variant: runs[0].rate for variant, runs in best_runs(results).items()}


def write_report(
    results: list[RunResult],
    output: Path,
    *,
    steps: int,
    step_seconds: dict[str, float] | None = None,
) -> str:
    """Write results.json, table.md and curves.png to `output`; the table.

    `step_seconds` are seconds per step of each variant, instead of those measured while training.
    """
    output.mkdir(parents=True, exist_ok=True)
    if step_seconds is not None:
        results = [
            replace(r, seconds=[step * step_seconds[r.variant] for step in r.steps])
            for r in results
        ]
    write_whole(output / "results.json", json.dumps([asdict(r) for r in results], indent=1) + "\n")
    table = markdown(results, steps=steps)
    write_whole(output / "table.md", table + "\n")
    if results:
        draw(results, output / "curves.png")
    return table


def best_runs(results: list[RunResult]) -> dict[str, list[RunResult]]:
    """For each variant its runs at the rate with the lowest loss of the first seed."""
    best = {}
    for variant in dict.fromkeys(r.variant for r in results):
        sweep = [r for r in results if r.variant == variant and r.seed == 1]
        if sweep:
            rate = min(sweep, key=lambda r: r.final_loss).rate
            best[variant] = [r for r in results if r.variant == variant and r.rate == rate]
    return best


def markdown(results: list[RunResult], *, steps: int) -> str:
    """Loss at equal steps and at equal time, with spread, and what the state weighs; the sweep."""
    best = best_runs(results)
    if not best:
        return "no run is finished yet"
    time = min(r.seconds[-1] for runs in best.values() for r in runs)
    grid = sorted({r.rate for r in results})
    tried = {v: sorted(r.rate for r in results if r.variant == v and r.seed == 1) for v in best}
    head = ["optimizer", "rate", "seeds", f"loss at step {steps}", f"loss after {time:.0f} s"]
    head += ["s per step", "state bytes per parameter"]
    rows = []
    for variant, runs in sorted(best.items(), key=lambda item: _mean(item[1], "final_loss")):
        at_time = [r.loss_at(time) for r in runs]
        ends = tried[variant][0], tried[variant][-1]
        edge = " (edge)" if len(grid) > 1 and runs[0].rate in ends else ""
        per_step = np.mean([r.seconds[-1] / steps for r in runs])
        losses = _spread([r.final_loss for r in runs]), _spread(at_time)
        weighs = f"{runs[0].state_bytes_per_parameter:.2f}"
        rate = f"{runs[0].rate:g}{edge}"
        rows.append((variant, rate, len(runs), *losses, f"{per_step:.3f}", weighs))
    first = {(r.variant, r.rate): f"{r.final_loss:.4f}" for r in results if r.seed == 1}
    sweep = [(variant, *(first.get((variant, rate), "-") for rate in grid)) for variant in best]
    parts = [
        f"Validation loss in nats per token, {steps} steps. ± is half the range over the seeds.",
        markdown_table(head, rows),
        "Sweep, seed 1, loss at the end:",
        markdown_table(("optimizer", *(f"{rate:g}" for rate in grid)), sweep),
    ]
    return "\n\n".join(parts)


def _mean(runs: list[RunResult], name: str) -> float:
    return float(np.mean([getattr(r, name) for r in runs]))


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def draw(results: list[RunResult], path: Path) -> None:
    """Mean curves at the best rates, with a band over the seeds: against steps and time."""
    from equilibrium_mcore.plots.figure import write_png

    write_png(path, lambda: _figure(results), dpi=120)


def _figure(results: list[RunResult]) -> Figure:
    from matplotlib import pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for number, (variant, runs) in enumerate(best_runs(results).items()):
        colour = f"C{number}"
        losses = np.array([r.loss for r in runs])
        label = f"{variant} ({runs[0].rate:g}, {len(runs)} seeds)"
        by_step.plot(runs[0].steps, losses.mean(axis=0), color=colour, label=label)
        if len(runs) > 1:
            low, high = losses.min(axis=0), losses.max(axis=0)
            by_step.fill_between(runs[0].steps, low, high, color=colour, alpha=0.2)
        seconds = np.mean([r.seconds for r in runs], axis=0)
        by_time.plot(seconds, losses.mean(axis=0), color=colour)
    by_step.set(xlabel="step", ylabel="validation loss (nats per token)")
    by_time.set(xlabel="seconds of training")
    by_step.legend(fontsize="small")
    for axis in (by_step, by_time):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure

"""Draws the curves of one run or several, from their `metrics.jsonl`, into one PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster; it must be set before pyplot is imported

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter  # noqa: E402

from equilibrium_mcore.training.metrics import METRICS_FILE, human, read_metrics  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: told apart with every kind of colour vision."""
GREY, INK = "#8a8a8a", "#333333"
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
}
EVENT_STYLES = {"resume": ("--", "resume"), "stop": (":", "stop"), "signal": (":", "signal")}


@dataclass(frozen=True)
class RunCurves:
    """The records of one run, ready to draw."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def column(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one number; values that are null become NaN, a gap in the line."""
        records: Sequence[Mapping[str, Any]] = getattr(self, kind)
        steps = np.array([record["step"] for record in records], dtype=float)
        values = [record.get(key) for record in records]
        return steps, np.array([np.nan if v is None else v for v in values], dtype=float)


def load_run(run: Path) -> RunCurves:
    """The curves of a run's directory, or of a `metrics.jsonl` itself.

    Raises FileNotFoundError without the file, ValueError when it holds no training record yet.
    """
    path = run / METRICS_FILE if run.is_dir() or run.suffix != ".jsonl" else run
    records = read_metrics(path)
    by_kind = {
        kind: [record for record in records if record["kind"] == kind]
        for kind in ("train", "validation", "event")
    }
    if not by_kind["train"]:
        raise ValueError(
            f"{path} holds no training record. Training adds one every logging.interval_steps "
            "steps; wait for the first, or look into the run's log for why there is none"
        )
    return RunCurves(
        name=path.resolve().parent.name,
        train=by_kind["train"],
        validation=by_kind["validation"],
        events=by_kind["event"],
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean that looks back over about a fortieth of the run, at most 50 records.

    It is an exponential mean without the pull of its start; NaNs are passed over.
    """
    window = min(50.0, max(1.0, len(values) / 40))
    decay = 1 - 1 / window
    total = weight = 0.0
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
            out[i] = total / weight
    return out


def plot_runs(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Draw the runs over each other and return the PNG's path.

    `output` defaults to `curves.png` in the first run's directory. Errors: see `load_run`.
    """
    if not runs:
        raise ValueError("no run to plot: name at least one run directory")
    curves = [load_run(Path(run)) for run in runs]
    if output is None:
        first = Path(runs[0])
        output = (first if first.is_dir() else first.parent) / "curves.png"
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"output={output} must end in .png")
    with plt.rc_context(STYLE):
        figure = draw(curves)
        aside = output.with_name(output.name + ".tmp")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(aside, dpi=150, format="png")
        plt.close(figure)
    os.replace(aside, output)
    return output


def draw(curves: Sequence[RunCurves]) -> Figure:
    """The figure: a large panel for the loss, and below it three small ones."""
    figure, axes = plt.subplots(
        4,
        1,
        figsize=(9.5, 10.5),
        sharex=True,
        layout="constrained",
        height_ratios=[2.7, 1, 1, 1],
    )
    loss, rates, norm, speed = axes
    _draw_loss(loss, curves)
    _draw_learning_rates(rates, curves)
    _draw_lines(norm, curves, "gradient_norm", "Gradient norm", "norm before clipping")
    _limit_to_bulk(norm, curves, "gradient_norm")
    _draw_lines(speed, curves, "tokens_per_second", "Throughput", "tokens/s", smoothed=False)
    _show_rate(speed, curves)
    speed.set_xlabel("optimizer step")
    speed.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max(run.train[-1]["step"] for run in curves)
    speed.set_xlim(0, last * 1.01 if last else 1)
    for axis in axes:
        _mark_events(axis, curves, labelled=axis is loss)
    _add_token_axis(loss, curves)
    title = curves[0].name if len(curves) == 1 else f"{len(curves)} runs"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.align_ylabels(axes)
    return figure


# ------------------------------------------------------------------------------------- the panels


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw_loss(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Raw loss faint, its running mean, validation as points, entropies as labelled lines."""
    for index, run in enumerate(curves):
        colour = _colour(index)
        steps, values = run.column("loss")
        label = f"training, {_last(values)}" if len(curves) == 1 else run.name
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)
        steps, values = run.column("loss", "validation")
        if len(steps):
            point_colour = COLOURS[1] if len(curves) == 1 else colour
            axis.plot(
                steps,
                values,
                color=point_colour,
                marker="o",
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linestyle="none",
                zorder=4,
                label=f"validation, {_last(values)}"
                if len(curves) == 1
                else f"{run.name}: validation",
            )
    _draw_entropies(axis, curves)
    axis.set_title("Loss")
    axis.set_ylabel("cross-entropy (nats per token)")
    axis.legend(loc="upper right")


def _last(values: np.ndarray) -> str:
    """How a legend tells the end of a line."""
    finite = values[np.isfinite(values)]
    return f"last {finite[-1]:.3f}" if len(finite) else "no finite value"


def _draw_entropies(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Unigram and bigram entropy of the validation tokens: what counting alone reaches."""
    for key, name in (("unigram_entropy", "unigram entropy"), ("bigram_entropy", "bigram entropy")):
        known = [run.column(key, "validation")[1] for run in curves]
        values = {round(float(v[np.isfinite(v)][-1]), 3) for v in known if np.isfinite(v).any()}
        for value in sorted(values):
            axis.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (6, 3)), zorder=1)
            axis.annotate(
                f"{name} {value:.2f}",
                (0.006, value),
                xycoords=axis.get_yaxis_transform(),
                xytext=(0, 2.5),
                textcoords="offset points",
                fontsize=8.5,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
                zorder=5,
            )


def _draw_learning_rates(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Both learning rates on a log axis, as they differ by orders; zero (in warmup) is a gap."""
    lines = (("learning_rate", "-", "matrices"), ("learning_rate_adamw", "--", "others (AdamW)"))
    for index, run in enumerate(curves):
        for key, style, label in lines:
            steps, values = run.column(key)
            values = np.where(values > 0, values, np.nan)
            axis.plot(
                steps,
                values,
                color=_colour(index),
                linestyle=style,
                linewidth=1.5,
                label=label if index == 0 else None,
            )
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=5))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title("Learning rate")
    axis.set_ylabel("learning rate")
    axis.legend(loc="lower right", ncols=2)


def _draw_lines(
    axis: Axes,
    curves: Sequence[RunCurves],
    key: str,
    title: str,
    unit: str,
    smoothed: bool = True,
) -> None:
    """One number of every run, from zero up."""
    for index, run in enumerate(curves):
        colour = _colour(index)
        steps, values = run.column(key)
        if smoothed:
            axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            values = smooth(values)
        axis.plot(steps, values, color=colour, linewidth=1.5)
    axis.set_ylim(bottom=0)
    axis.set_title(title)
    axis.set_ylabel(unit)


def _limit_to_bulk(axis: Axes, curves: Sequence[RunCurves], key: str) -> None:
    """Cut the axis above the bulk of the values and say so: one spike must not flatten the rest."""
    values = np.concatenate([run.column(key)[1] for run in curves])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    bulk, highest = 1.5 * float(np.quantile(values, 0.98)), float(values.max())
    if highest > 2 * bulk > 0:
        axis.set_ylim(0, bulk)
        axis.annotate(
            f"highest {highest:.3g}, cut off",
            (0.995, 0.97),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8.5,
        )


def _show_rate(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Readable tokens/s; for one run, its proportional TFLOP/s on the right side."""
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    if len(curves) > 1:
        return
    speed = curves[0].column("tokens_per_second")[1]
    tflops = curves[0].column("model_tflops_per_device")[1]
    usable = np.isfinite(speed) & np.isfinite(tflops) & (speed > 0) & (tflops > 0)
    if not usable.any():
        return
    factor = float(np.median(tflops[usable] / speed[usable]))
    right = axis.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
    right.spines["right"].set_visible(True)
    right.set_ylabel("model TFLOP/s per device")


def _mark_events(axis: Axes, curves: Sequence[RunCurves], *, labelled: bool) -> None:
    """A vertical line where a run was stopped, signalled or resumed; one label per place."""
    names: dict[tuple[float, int], list[str]] = {}
    for index, run in enumerate(curves):
        for event in run.events:
            if event.get("event") in EVENT_STYLES:
                happened = names.setdefault((event["step"], index), [])
                if event["event"] not in happened:
                    happened.append(event["event"])
    for (step, index), happened in names.items():
        colour = GREY if len(curves) == 1 else _colour(index)
        axis.axvline(step, color=colour, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
        if labelled:
            axis.annotate(
                ", ".join(happened),
                (step, 0.01),
                xycoords=axis.get_xaxis_transform(),
                xytext=(3, 0),
                textcoords="offset points",
                rotation=90,
                va="bottom",
                fontsize=8.5,
                color=colour if len(curves) > 1 else INK,
            )


def _add_token_axis(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Tokens along the top, when all runs have the same tokens per step."""
    ratios = {
        round(run.train[-1]["tokens"] / run.train[-1]["step"])
        for run in curves
        if run.train[-1]["step"] and run.train[-1].get("tokens")
    }
    if len(ratios) != 1:
        return
    per_step = ratios.pop()
    top = axis.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
    top.spines["top"].set_visible(True)
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    top.set_xlabel("tokens")

"""Draws the curves of one run or several, from their `metrics.jsonl`, into one PNG."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from equilibrium_mcore.files.paths import real_path
from equilibrium_mcore.plots.figure import COLOURS, GREY, INK, colour_of, write_png
from equilibrium_mcore.training.metrics import METRICS_FILE, TrainRecord, human, read_metrics
from equilibrium_mcore.training.plot_panels import draw_together, panels_of

MARKED_EVENTS = ("signal", "stop", "resume")
FEW_RECORDS = 30
"""Up to so many records, each is shown as a point too: one alone would draw no line."""


@dataclass(frozen=True)
class RunCurves:
    """The records of one run, ready to draw."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def column(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one number; values that are null become NaN, a gap in the line."""
        records: Sequence[Mapping[str, Any]] = getattr(self, kind)
        steps = np.array([record["step"] for record in records], dtype=float)
        values = [record.get(key) for record in records]
        return steps, np.array([np.nan if v is None else v for v in values], dtype=float)


def load_curves(run: Path) -> RunCurves:
    """The curves of a run's directory, or of a `metrics.jsonl` itself.

    Raises FileNotFoundError without the file, ValueError when it holds no training record yet.
    """
    path = run / METRICS_FILE if run.is_dir() or run.suffix != ".jsonl" else run
    records = read_metrics(path)
    by_kind = {
        kind: [record for record in records if record["kind"] == kind]
        for kind in ("train", "validation", "evaluation", "event")
    }
    if not by_kind["train"]:
        raise ValueError(
            f"{path} holds no training record. Training adds one every logging.interval_steps "
            "steps; wait for the first, or look into the run's log for why there is none"
        )
    return RunCurves(
        name=real_path(path).parent.name,
        train=by_kind["train"],
        validation=by_kind["validation"],
        evaluation=by_kind["evaluation"],
        events=by_kind["event"],
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """The trend: at each record, the straight line fitted to its neighbours on both sides.

    Unlike a running mean it does not lag behind a falling loss, nor bend at the ends. NaNs are
    left out of the fits and stay NaN.
    """
    half = _half_window(len(values))
    offsets = np.arange(-half, half + 1, dtype=float)
    known = np.isfinite(values)
    weights = np.pad(known.astype(float), half)
    filled = np.pad(np.where(known, values, 0.0), half)
    # Sums over the window of 1, x, x^2, y and xy: the normal equations of each fit, at x = 0.
    s0, s1, s2 = (np.correlate(weights, offsets**power, "valid") for power in (0, 1, 2))
    t0, t1 = (np.correlate(filled, offsets**power, "valid") for power in (0, 1))
    determinant = s0 * s2 - s1 * s1
    fitted = np.divide(s2 * t0 - s1 * t1, determinant, out=values.copy(), where=determinant > 0)
    return np.where(known, fitted, np.nan)


def running_median(values: np.ndarray) -> np.ndarray:
    """The median of each record's neighbours on both sides: a spike leaves it alone."""
    half = _half_window(len(values))
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    known = np.isfinite(values)
    out = np.full(len(values), np.nan)
    out[known] = np.nanmedian(windows[known], axis=1)
    return out


def _half_window(records: int) -> int:
    """Neighbours on each side: a fiftieth of the run, between 2 and 25 records."""
    return min(25, max(2, records // 50))


def plot_runs(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Draw the runs over each other and return the PNG's path.

    `output` defaults to `curves.png` in the first run's directory. Errors: see `load_curves`.
    """
    if not runs:
        raise ValueError("no run to plot: name at least one run directory")
    curves = [load_curves(Path(run)) for run in runs]
    if output is None:
        first = Path(runs[0])
        output = (first if first.is_dir() else first.parent) / "curves.png"
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"output={output} must end in .png")
    return write_png(output, lambda: draw(curves))


def draw(curves: Sequence[RunCurves]) -> Figure:
    """The figure: a large panel for the loss, one for each further figure of the objective or some
    of them together, and three small ones."""
    held_out = panels_of(_names(curves, "evaluation", known=("step", "kind")))
    panels = panels_of(_named_figures(curves))
    rows = 4 + len(held_out) + len(panels)
    figure, axes = plt.subplots(
        rows,
        1,
        figsize=(9.5, 10.5 + 1.8 * (rows - 4)),
        sharex=True,
        layout="constrained",
        height_ratios=[2.7] + [1] * (rows - 1),
    )
    loss, *others, rates, norm, speed = axes
    _draw_loss(loss, curves)
    for axis, panel in zip(others[: len(held_out)], held_out, strict=True):
        draw_together(axis, curves, panel, kind="evaluation")
    for axis, panel in zip(others[len(held_out) :], panels, strict=True):
        if len(panel.figures) > 1:
            draw_together(axis, curves, panel, kind="train")
        else:
            _draw_figure(axis, curves, panel.figures[0])
    _draw_learning_rates(rates, curves)
    _draw_gradient_norm(norm, curves)
    _draw_throughput(speed, curves)
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


def _draw_loss(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Raw loss faint, its trend, validation as points, entropies as labelled lines."""
    alone = len(curves) == 1
    for index, run in enumerate(curves):
        colour = colour_of(index)
        steps, values = run.column("loss")
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        points, validation = run.column("loss", "validation")
        if alone:
            name = f"training, {_last(values)}"
        else:
            name = f"{run.name} (validation {_last(validation)})" if len(points) else run.name
        axis.plot(steps, smooth(values), color=colour, label=name, **_line(steps, 1.8))
        if len(points):
            axis.plot(
                points,
                validation,
                color=COLOURS[1] if alone else colour,
                marker="o",
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linestyle="none",
                zorder=4,
                label=f"validation, {_last(validation)}" if alone else None,
            )
    _draw_entropies(axis, curves)
    axis.set_ylabel("loss (nats per token)")
    axis.legend(loc="upper right")


def _named_figures(curves: Sequence[RunCurves]) -> list[str]:
    """Names of what an objective logged beside the loss, in the order of the records."""
    known = ("kind", *(field.name for field in dataclasses.fields(TrainRecord)))
    return _names(curves, "train", known=known)


def _names(curves: Sequence[RunCurves], kind: str, *, known: Sequence[str]) -> list[str]:
    """Names in the records of a kind, but for those that are known."""
    names = (name for run in curves for record in getattr(run, kind) for name in record)
    return [name for name in dict.fromkeys(names) if name not in known]


def _draw_figure(axis: Axes, curves: Sequence[RunCurves], name: str) -> None:
    """One figure of the objective: its trend, and validation as points."""
    for index, run in enumerate(curves):
        steps, values = run.column(name)
        axis.plot(steps, values, color=colour_of(index), alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth(values), color=colour_of(index), **_line(steps, 1.5))
        points, validation = run.column(name, "validation")
        axis.plot(points, validation, color=colour_of(index), marker="o", linestyle="none")
    axis.set_ylabel(name)


def _line(steps: np.ndarray, width: float) -> dict[str, Any]:
    """How a line of so many records is drawn."""
    few = len(steps) <= FEW_RECORDS
    return {"linewidth": width, "marker": "o" if few else None, "markersize": 3}


def _last(values: np.ndarray) -> str:
    """How a legend tells the end of a line."""
    finite = values[np.isfinite(values)]
    return f"last {finite[-1]:.3f}" if len(finite) else "no finite value"


def _draw_entropies(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Unigram and bigram entropy of the validation tokens: what counting alone reaches."""
    for key, name in (("unigram_entropy", "unigram"), ("bigram_entropy", "bigram")):
        known = [run.column(key, "validation")[1] for run in curves]
        values = {round(float(v[np.isfinite(v)][-1]), 2) for v in known if np.isfinite(v).any()}
        for value in sorted(values):
            axis.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (6, 3)), zorder=1)
            axis.annotate(
                f"{name}\nentropy {value:.2f}",
                (1.0, value),
                xycoords=axis.get_yaxis_transform(),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )


def _draw_learning_rates(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Both learning rates on a log axis, as they differ by orders; zero (in warmup) is a gap."""
    lines = (("learning_rate", "-", "matrices"), ("learning_rate_adamw", "--", "others (AdamW)"))
    for index, run in enumerate(curves):
        for key, style, _ in lines:
            steps, values = run.column(key)
            values = np.where(values > 0, values, np.nan)
            axis.plot(
                steps,
                values,
                color=colour_of(index),
                linestyle=style,
                **_line(steps, 1.5),
            )
    colour = colour_of(0) if len(curves) == 1 else INK
    for _, style, label in lines:
        axis.plot([], [], color=colour, linestyle=style, linewidth=1.5, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=5))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title("Learning rate")
    axis.set_ylabel("learning rate")
    # Beside the title, where no line can run into it.
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)


def _draw_gradient_norm(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Raw norm faint, its running median, from zero up."""
    for index, run in enumerate(curves):
        steps, values = run.column("gradient_norm")
        axis.plot(steps, values, color=colour_of(index), alpha=0.4, linewidth=0.8)
        axis.plot(steps, running_median(values), color=colour_of(index), **_line(steps, 1.5))
    axis.set_ylim(bottom=0)
    axis.set_title("Gradient norm")
    axis.set_ylabel("norm before clipping")
    _limit_to_bulk(axis, curves, "gradient_norm")


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


def _draw_throughput(axis: Axes, curves: Sequence[RunCurves]) -> None:
    """Tokens/s from zero up; for one run, its proportional TFLOP/s on the right side."""
    for index, run in enumerate(curves):
        steps, values = run.column("tokens_per_second")
        axis.plot(steps, values, color=colour_of(index), **_line(steps, 1.3))
    axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
    axis.set_title("Throughput")
    axis.set_ylabel("tokens/s, all devices")
    axis.yaxis.set_major_formatter(FuncFormatter(_tick))
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
    right.set_ylabel("TFLOP/s per device")


def _tick(value: float, _position: int) -> str:
    """A count on an axis: 4k rather than 4.0k."""
    return human(value).replace(".0", "")


def _mark_events(axis: Axes, curves: Sequence[RunCurves], *, labelled: bool) -> None:
    """A vertical line where a run was stopped, signalled or resumed; one label per place."""
    names: dict[tuple[float, int], list[str]] = {}
    for index, run in enumerate(curves):
        for event in run.events:
            if event.get("event") in MARKED_EVENTS:
                happened = names.setdefault((event["step"], index), [])
                if event["event"] not in happened:
                    happened.append(event["event"])
    for (step, index), happened in names.items():
        colour = GREY if len(curves) == 1 else colour_of(index)
        axis.axvline(step, color=colour, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
        if labelled:
            # Above the falling curve, and on the right side below the legend.
            height = 0.98 if step < 0.5 * axis.get_xlim()[1] else 0.74
            axis.annotate(
                ", ".join(happened),
                (step, height),
                xycoords=axis.get_xaxis_transform(),
                xytext=(3, 0),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=8.5,
                color=colour if len(curves) > 1 else INK,
                annotation_clip=True,
            ).set_in_layout(False)


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
    top.xaxis.set_major_formatter(FuncFormatter(_tick))
    top.set_xlabel("tokens")

"""A certificate as one picture: how far every quantity was off, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from equilibrium_mcore.plots.figure import COLOURS, GREY, INK, colour_of, write_png

SMALLEST, ZERO, LARGEST = 1e-17, 1e-18, 10.0
"""The axis is logarithmic, so 0 has a place of its own at the left; larger ones and nan are cut."""
FAULT = COLOURS[1]
MARKERS = "osD^vP"
ALLOWED = "#e3f0e8"

Verdicts = list[Mapping[str, Any]]


def plot_certificate(values: Mapping[str, Any], path: Path) -> Path:
    """Draw a certificate's plain values (its JSON) into the PNG `path`; returns the path.

    Raises ValueError when the path does not end in .png, or nothing was compared.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} must end in .png")
    compared = {**values["layouts"], **values["witnesses"]}
    if not any(compared.values()):
        raise ValueError(
            f"the certificate of {values['run']} compares nothing, so nothing is drawn"
        )
    return write_png(path, lambda: draw(values, compared))


def draw(values: Mapping[str, Any], compared: Mapping[str, Verdicts]) -> Figure:
    """One line per quantity, a mark per layout or witness, and the tolerance."""
    tolerances = {v["what"]: v["tolerance"] for found in compared.values() for v in found}
    rows = {what: row for row, what in enumerate(tolerances)}
    figure, axis = plt.subplots(figsize=(9.5, 1.5 + 0.235 * len(rows)), layout="constrained")
    _draw_tolerances(axis, list(tolerances.values()))
    for index, (name, verdicts) in enumerate(compared.items()):
        colour = INK if name in values["witnesses"] else _layout_colour(index)
        marks = {"marker": MARKERS[index % len(MARKERS)], "color": colour, "label": _short(name)}
        above = (index + 0.5) / len(compared) - 0.5  # so that equal marks do not hide each other
        _draw_marks(axis, verdicts, rows, above=0.5 * above, marks=marks)
    axis.set_xscale("log")
    axis.set_xlim(ZERO / 3, LARGEST * 3)
    axis.set_xticks([ZERO, *(10.0**power for power in range(-16, 1, 4))])
    axis.set_xticklabels(["0", *(f"$10^{{{power}}}$" for power in range(-16, 1, 4))])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("worst relative difference from one rank")
    verdict = "the same numbers" if values["passed"] else "NOT the same numbers"
    figure.suptitle(f"{values['run']}: {verdict}", x=0.01, ha="left", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_tolerances(axis: Axes, tolerances: list[float]) -> None:
    """What is allowed as a band up to a line; of a tolerance of 0 the line alone."""
    ends = [_place(tolerance) for tolerance in tolerances]
    axis.hlines(range(len(ends)), ZERO, ends, color=ALLOWED, linewidth=8, zorder=1)
    style = {"color": GREY, "marker": "|", "markersize": 11, "markeredgewidth": 1.6}
    axis.plot(ends, range(len(ends)), linestyle="none", label="tolerance", zorder=2, **style)


def _draw_marks(
    axis: Axes,
    verdicts: Verdicts,
    rows: Mapping[str, int],
    *,
    above: float,
    marks: Mapping[str, Any],
) -> None:
    """The marks of one layout or witness; a large cross where it is beyond tolerance."""
    style = {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.5}
    places = [(_place(v["worst_relative_difference"]), rows[v["what"]] + above) for v in verdicts]
    axis.plot(*zip(*places, strict=True), zorder=4, markersize=5, **marks, **style)
    beyond = [place for place, v in zip(places, verdicts, strict=True) if not v["passed"]]
    if beyond:
        cross = {"marker": "X", "color": FAULT, "markersize": 12}
        label = f"{marks['label']}: beyond tolerance"
        axis.plot(*zip(*beyond, strict=True), zorder=3, label=label, **cross, **style)


def _place(difference: float) -> float:
    """Where a difference stands on the axis."""
    if not math.isfinite(difference):
        return LARGEST
    return ZERO if difference == 0 else min(max(difference, SMALLEST), LARGEST)


def _layout_colour(index: int) -> str:
    """Colours of layouts leave out the one of faults."""
    return colour_of(index if index < COLOURS.index(FAULT) else index + 1)


def _short(name: str) -> str:
    return name.partition(":")[0]

"""One look for every picture, and one way to write it: colours, fonts, PNG files written whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a cluster; it must be set before pyplot is imported

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from equilibrium_mcore.files.whole import whole_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: distinguishable with every kind of colour vision."""
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
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
}


def colour_of(index: int) -> str:
    """The colour of line number `index`; they repeat after the last."""
    return COLOURS[index % len(COLOURS)]


def write_png(path: Path, draw: Callable[[], Figure], *, dpi: int = 150) -> Path:
    """Draw in the project's style and write the PNG whole; returns its path."""
    with plt.rc_context(STYLE):
        figure = draw()
        with whole_file(path, "wb") as stream:
            figure.savefig(stream, dpi=dpi, format="png")
        plt.close(figure)
    return path

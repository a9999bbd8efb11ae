"""The report at a glance: refusals, wins, and the divergence of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equilibrium_mcore.alignment.report import KL, MEANING, WIN_RATE
from equilibrium_mcore.alignment.rows import Row
from equilibrium_mcore.plots.figure import GREY, colour_of, write_png


def write_picture(path: Path, figures: dict[str, Any], rows: Sequence[Row]) -> bool:
    """Draw what there is; whether there was anything."""
    panels = [
        (panel, values)
        for panel, values in (
            (_refusals, figures["refusals"]),
            (_wins, figures["wins"]),
            (_divergence, [row.kl for row in rows if row.kl is not None]),
        )
        if values
    ]
    if not panels:
        return False

    def draw() -> Figure:
        figure, axes = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.2), squeeze=False)
        for ax, (panel, values) in zip(axes[0], panels, strict=True):
            panel(ax, values)
        figure.tight_layout()
        return figure

    write_png(path, draw)
    return True


def _refusals(ax: Axes, shares: dict[str, Any]) -> None:
    for side, name in enumerate(("before", "after")):
        places = [place + 0.4 * side for place in range(len(shares))]
        values = [shares[kind][name]["share"] for kind in shares]
        ends = [shares[kind][name]["interval"] for kind in shares]
        reach = [
            [v - low for v, (low, _) in zip(values, ends, strict=True)],
            [high - v for v, (_, high) in zip(values, ends, strict=True)],
        ]
        ax.bar(
            places, values, 0.36, yerr=reach, color=colour_of(side), label=name.upper(), capsize=3
        )
    ax.set_xticks([place + 0.2 for place in range(len(shares))], [MEANING[k][0] for k in shares])
    ax.set(ylim=(0, 1), title="refusals, by phrases")
    ax.legend()


def _wins(ax: Axes, wins: dict[str, Any]) -> None:
    counts = [wins["after"], wins["ties"], wins["before"]]
    ax.bar(["AFTER", "tie", "BEFORE"], counts, color=[colour_of(1), GREY, colour_of(0)])
    title = "preferred answers"
    if wins["rate"] is not None:
        low, high = wins["interval"]
        title = f"won {wins['rate']:.0%} ({low:.0%} to {high:.0%}), wanted {WIN_RATE:.0%}"
    ax.set(title=title, ylabel="pairs")


def _divergence(ax: Axes, values: list[float]) -> None:
    ax.hist(values, bins=min(20, max(4, len(values) // 2)), color=colour_of(2))
    ax.axvline(KL, color=GREY, linestyle="--", label="target")
    ax.set(title="KL per token of AFTER's answers", xlabel="nats", ylabel="answers")
    ax.legend()

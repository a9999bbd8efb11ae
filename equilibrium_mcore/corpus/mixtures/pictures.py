"""An analysis as pictures: shares, what was dropped, lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equilibrium_mcore.corpus.mixtures.analyze import MixtureAnalysis
from equilibrium_mcore.plots.figure import COLOURS, GREY, colour_of, write_png


def draw(analysis: MixtureAnalysis, folder: Path) -> list[str]:
    """Write the PNGs that there is something for; returns their names."""
    drawn = [_save(analysis, folder / "shares.png", _shares, len(analysis.sources))]
    if analysis.prepared:
        drawn.append(_save(analysis, folder / "dropped.png", _dropped, len(analysis.sources)))
        drawn.append(_save(analysis, folder / "lengths.png", _lengths, 6))
    return drawn


def _save(
    analysis: MixtureAnalysis, path: Path, fill: Callable[[Axes, MixtureAnalysis], None], rows: int
) -> str:
    def picture() -> Figure:
        figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * max(rows, 3)), layout="constrained")
        fill(axes, analysis)
        return figure

    return write_png(path, picture).name


def _shares(axes: Axes, analysis: MixtureAnalysis) -> None:
    bars = [
        ("expected", [s.expected_share for s in analysis.sources]),
        ("training, by the blend", [s.training_share for s in analysis.sources]),
        ("on disk", [s.prepared_share for s in analysis.sources]),
    ]
    bars = [(name, values) for name, values in bars if None not in values]
    height = 0.8 / len(bars)
    places = np.arange(len(analysis.sources))
    for number, (name, values) in enumerate(bars):
        axes.barh(places + number * height, values, height, label=name, color=colour_of(number))
    axes.set_yticks(places + 0.4 - height / 2, [s.name for s in analysis.sources])
    axes.invert_yaxis()
    axes.set_xlabel("share of tokens")
    axes.set_title(f"{analysis.name}: shares")
    axes.legend(frameon=False)


def _dropped(axes: Axes, analysis: MixtureAnalysis) -> None:
    names = [source.name for source in analysis.sources]
    kinds = sorted({reason.split(":")[0] for s in analysis.sources for reason in s.dropped})
    parts = {
        "kept": [s.documents or 0 for s in analysis.sources],
        "not needed": [s.not_needed or 0 for s in analysis.sources],
    }
    for kind in kinds:
        parts[kind] = [
            sum(count for reason, count in s.dropped.items() if reason.split(":")[0] == kind)
            for s in analysis.sources
        ]
    rows = np.maximum(1, [s.rows or 0 for s in analysis.sources])
    left = np.zeros(len(names))
    colours = ["#009E73", "#cccccc", *(colour_of(i) for i in (1, 4, 3, 5, 0, 6))]
    for (part, counts), colour in zip(parts.items(), colours * 4, strict=False):
        share = np.array(counts) / rows
        axes.barh(names, share, left=left, label=part, color=colour)
        left += share
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the rows that were read")
    axes.set_title(f"{analysis.name}: kept and dropped")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _lengths(axes: Axes, analysis: MixtureAnalysis) -> None:
    for number, source in enumerate(analysis.sources):
        lengths = source.lengths
        if lengths is None or not lengths.documents:
            continue
        shares = np.array(lengths.histogram) / lengths.documents
        colour = colour_of(number)
        style = ("-", "--", ":")[number // len(COLOURS) % 3]
        edges = 2.0 ** np.arange(shares.size + 1)
        axes.stairs(shares, edges, label=source.name, color=colour, linestyle=style)
    if analysis.unit == "tokens":
        axes.axvline(analysis.sequence_length, color=GREY, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens" if analysis.unit == "tokens" else "characters of a line")
    axes.set_ylabel("share of documents")
    axes.set_title(f"{analysis.name}: lengths of documents")
    axes.legend(frameon=False)

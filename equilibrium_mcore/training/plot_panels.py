"""Which figures of a run share a panel, and how such a panel is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes

from equilibrium_mcore.plots.figure import colour_of

# By the panel's label: names of figures, `*` for any text. What is in none has a panel of its own.
TOGETHER: dict[str, tuple[str, ...]] = {
    "reward": ("reward", "reward_*"),
    "tokens of an answer": ("answer_tokens", "answer_tokens_most"),
    "share of answers": ("cut_off", "dead_groups", "unparsed", "timeout", "error"),
    "share clipped": ("clipped_below", "clipped_above"),
    "KL, nats per token": ("kl_old", "kl_reference", "k1", "k3"),
    "engine against training, nats": ("mismatch_mean", "mismatch_max", "mismatch_k3"),
    "held-out answers": ("accuracy", "sampled_accuracy", "pass_at_*"),
}
DASHES = ("-", "--", ":", "-.")


class Curves(Protocol):
    """A run's records; see `plot.RunCurves`."""

    name: str

    def column(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one number."""


class Panel(NamedTuple):
    """A label, and the figures that are drawn under it."""

    label: str
    figures: tuple[str, ...]


def panels_of(names: Sequence[str]) -> list[Panel]:
    """The panels of figures, in the order of their first figures."""
    by_label: dict[str, list[str]] = {}
    for name in names:
        label = next(
            (
                label
                for label, patterns in TOGETHER.items()
                if any(fnmatchcase(name, pattern) for pattern in patterns)
            ),
            name,
        )
        by_label.setdefault(label, []).append(name)
    return [
        Panel(label if len(found) > 1 else found[0], tuple(found))
        for label, found in by_label.items()
    ]


def draw_together(axis: Axes, curves: Sequence[Curves], panel: Panel, *, kind: str) -> None:
    """Several figures: of one run in colours, of several runs in dashes."""
    alone = len(curves) == 1
    for run_number, run in enumerate(curves):
        for number, name in enumerate(panel.figures):
            steps, values = run.column(name, kind)
            style: dict[str, Any] = {"color": colour_of(number if alone else run_number)}
            if not alone:
                style["linestyle"] = DASHES[number % len(DASHES)]
            axis.plot(
                steps,
                values,
                linewidth=1.3,
                marker="o" if kind != "train" else None,
                markersize=4,
                label=name if run_number == 0 else None,
                **style,
            )
    axis.set_ylabel(panel.label)
    axis.legend(loc="best", fontsize=8)

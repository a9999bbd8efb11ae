"""Whether a step is sound: a robust test on loss and gradient norm, the same on all ranks.

A value is a spike where it is further above the median of the window than `threshold` robust
standard deviations. The deviation is 1.4826 times the median distance from the median, which a few
spikes in the window do not move (Rousseeuw and Croux 1993), and never less than a share of the
median, so that a flat curve does not make everything a spike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from equilibrium_mcore.config.anomalies import AnomaliesConfig

FEWEST = 16  # steps in the window before a spike is judged, or all of a smaller window
FLOOR = 0.02  # of the median: the least that a standard deviation is taken for
NORMAL = 1.4826  # a normal distribution's standard deviation over its median distance


@dataclass(frozen=True)
class Anomaly:
    """A step that is not sound; nothing was updated by it."""

    step: int  # that it would have been
    what: str  # which value, and what was to be expected
    loss: float
    gradient_norm: float
    ranges: list[list[int]]  # its samples, [first, count] by position in the data


class Watch:
    """Judges steps, and remembers those that were sound. Its state is plain values."""

    def __init__(self, settings: AnomaliesConfig) -> None:
        self.settings = settings
        window = settings.window_steps
        self._sound: dict[str, deque[float]] = {
            name: deque(maxlen=window) for name in ("loss", "gradient norm")
        }
        self.count = 0
        """Anomalies of the run so far."""

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with these values; None where nothing is, and they are remembered."""
        values = {"loss": loss, "gradient norm": gradient_norm}
        problems = list(self._problems(values))
        if problems:
            self.count += 1
            return "; ".join(problems)
        for name, value in values.items():
            self._sound[name].append(value)
        return None

    def _problems(self, values: dict[str, float]) -> Iterator[str]:
        for name, value in values.items():
            if not math.isfinite(value):
                yield f"the {name} is {value}"
            elif (limit := self._limit(name)) is not None and value > limit[1]:
                median, highest = limit
                yield (
                    f"the {name} is {value:.6g}, the median of the last {len(self._sound[name])} "
                    f"sound steps {median:.6g}, and {highest:.6g} the most that passes"
                )

    def _limit(self, name: str) -> tuple[float, float] | None:
        """Median and highest value that passes; None before the window is filled enough."""
        window = self._sound[name]
        if len(window) < max(1, min(FEWEST, self.settings.window_steps)):
            return None
        median = statistics.median(window)
        distance = statistics.median(abs(value - median) for value in window)
        deviation = max(NORMAL * distance, FLOOR * abs(median))
        return median, median + self.settings.threshold * deviation

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run judges as the straight one would."""
        return {"count": self.count, **{name: list(seen) for name, seen in self._sound.items()}}

    def load(self, state: dict[str, Any], *, count: int | None = None) -> None:
        """Take back what `state` gave; `count` is kept beside it where a run goes back."""
        self.count = state["count"] if count is None else count
        for name, seen in self._sound.items():
            seen.clear()
            seen.extend(state[name])

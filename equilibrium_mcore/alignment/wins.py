"""How often one model's answer was preferred, and how sure that is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Z = 1.959964  # 95% of a normal distribution lie within so many deviations


def wilson(share: float, count: int, *, z: float = Z) -> tuple[float, float]:
    """The interval of a share of `count` trials (Wilson, 1927); 0 and 1 where there are none."""
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Wins:
    """Pairs by who was preferred; `errors` are those that could not be judged: no opinion."""

    after: int
    before: int
    ties: int
    errors: int = 0
    swayed: int = 0  # of the ties, those where the judge followed the place of the answers

    @classmethod
    def of(cls, preferences: Iterable[str], *, swayed: int = 0) -> Wins:
        """Counts of `after`, `before`, `tie` and `error`."""
        found = Counter(preferences)
        return cls(found["after"], found["before"], found["tie"], found["error"], swayed)

    @property
    def judged(self) -> int:
        """Pairs with an opinion."""
        return self.after + self.before + self.ties

    @property
    def rate(self) -> float | None:
        """The share that AFTER won, a tie as half a win; None without pairs."""
        return (self.after + self.ties / 2) / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, at 95%. Ties vary less than wins and losses, so it is rather too wide."""
        return wilson(self.rate or 0.0, self.judged)

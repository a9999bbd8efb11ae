"""One line of a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A quantity, how far it was off at worst, and how far it may be."""

    what: str
    difference: float  # worst relative difference
    tolerance: float
    where: str  # the first parameter, layer or step beyond tolerance; else the worst one
    warns: bool = False  # whether it only warns when it is beyond tolerance

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for nan

    @property
    def fails(self) -> bool:
        """Whether the certificate fails by it."""
        return not (self.passed or self.warns)


def worst_verdict(
    what: str, differences: dict[str, float], tolerance: float, *, warns: bool = False
) -> Verdict:
    """The first place beyond tolerance, with the worst difference of all."""
    worst = max(differences, key=lambda name: _size(differences[name]))
    beyond = [name for name, value in differences.items() if not value <= tolerance]
    where = beyond[0] if beyond else worst
    return Verdict(what, differences[worst], tolerance, where, warns)


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value

"""Routing compared choice by choice, and true ties told from faults.

Two layouts round differently, so a token whose last chosen expert and first one left out have equal
scores, to within rounding, may go to either. From there on the two train on different numbers, and
both are right. Such a tie is named; any other difference is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from equilibrium_mcore.certify.routing import Routing
from equilibrium_mcore.certify.verdict import Verdict, worst_verdict

Choices = dict[tuple[int, int], Routing]  # by (step, layer)


@dataclass(frozen=True)
class Tie:
    """A token that two experts score alike."""

    step: int  # from 1; its numbers and those of later steps cannot be compared
    text: str


def find_tie(found: Choices, expected: Choices, *, rounding: float, length: int) -> Tie | None:
    """The tie, if that is why the choices differ where they differ first.

    Args:
        rounding: scores that lie no further apart, relative to the largest, are equal.
        length: positions of a sequence.
    """
    for (step, layer), routing in sorted(expected.items()):
        other = found.get((step, layer))
        if other is None or other.chosen.shape != routing.chosen.shape:
            return None
        wrong = (other.chosen != routing.chosen).any(-1).nonzero().flatten()
        if len(wrong):
            # Up to here both computed from the same numbers, so each of these has to be a tie.
            apart = routing.margin[wrong].max().item()
            if not apart <= rounding:
                return None
            sequence, position = divmod(int(wrong[0]), length)
            return Tie(
                step,
                f"a tie in step {step}, layer {layer}, sequence {sequence + 1}, position "
                f"{position}: the scores of two experts lie {apart:.0e} of the largest apart, and "
                "rounding decides which one is chosen",
            )
    return None


def compare_choices(found: Choices, expected: Choices, *, tie: Tie | None) -> Verdict:
    """The share of tokens that go to other experts, in the steps before a tie."""
    shares = {"no step": 0.0} if tie is not None else {}
    for (step, layer), routing in sorted(expected.items()):
        if tie is not None and step >= tie.step:
            continue
        other = found.get((step, layer))
        same_shape = other is not None and other.chosen.shape == routing.chosen.shape
        wrong = (other.chosen != routing.chosen).any(-1).double().mean() if same_shape else 1.0
        shares[f"step {step}, layer {layer}"] = float(wrong)
    return worst_verdict("share of tokens routed elsewhere, every step", shares, 0.0)

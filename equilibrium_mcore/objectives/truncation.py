"""What becomes of answers that were cut off at their length, by name.

score      they earn what they were scored, as if they had ended
zero       they earn 0, as if they had ended
mask       nothing is learnt from them
bootstrap  they earn what the critic expects after their last token, and no score
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Outcomes(NamedTuple):
    """Of each answer: its score, the value after it, and whether it is learnt from. All [R]."""

    scores: Tensor
    bootstraps: Tensor
    learnt: Tensor


def outcomes(scores: Tensor, cut: Tensor, *, way: str, after: Tensor | None = None) -> Outcomes:
    """The outcomes of answers, of which `cut` (bool [R]) reached their length without an end.

    `after` [R]: the critic's value after the last token, for `bootstrap`.
    """
    scores, nothing = scores.double(), torch.zeros(len(scores), dtype=torch.float64)
    learnt = torch.ones(len(scores), dtype=torch.bool)
    if way == "score":
        return Outcomes(scores, nothing, learnt)
    earned = torch.where(cut, 0.0, scores)
    if way == "zero":
        return Outcomes(earned, nothing, learnt)
    if way == "mask":
        return Outcomes(earned, nothing, ~cut)
    if way != "bootstrap":
        raise ValueError(f"truncated={way!r}: must be score, zero, mask or bootstrap")
    if after is None:
        raise ValueError("truncated='bootstrap' needs the values of a critic")
    return Outcomes(earned, torch.where(cut, after.double(), 0.0), learnt)

"""The loss of a reward model, as a function of the scores of both answers of a pair.

    -log s(R_w - R_l - margin) + c (R_w + R_l)^2

Bradley-Terry; the margin is arXiv 2307.09288's, and the second term, which keeps scores near 0,
arXiv 2312.09244's. s is the logistic function.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """One value a pair, [P]; `chosen` and `rejected` are the scores, [P]."""
    loss = -logsigmoid(chosen - rejected - margin)
    return loss + centring * (chosen + rejected).square() if centring else loss

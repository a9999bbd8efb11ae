"""Losses of pairs, a chosen and a rejected answer to one prompt, as functions of their likelihoods.

Shapes: P pairs. `Answers` are what the policy, and the reference, think of the answers of P
prompts; every loss gives one value a pair, which the caller averages.

    dpo    -log s(h) (1 - e) - log s(-h) e,  h = beta * (ratio_w - ratio_l)        arXiv 2305.18290
    ipo    (mean ratio_w - mean ratio_l - 1 / (2 beta))^2                         arXiv 2310.12036
    simpo  -log s(beta * (mean log p_w - mean log p_l) - gamma)                    arXiv 2405.14734
    orpo   -mean log p_w + beta * -log s(log odds_w - log odds_l)                  arXiv 2403.07691

A ratio is log p - log p of the reference, summed over an answer's tokens; a mean is divided by
their number (in `ipo` as its authors' errata and trl have it); s is the logistic function; odds are
p / (1 - p) of the mean log p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Answers:
    """Sums of log p in nats over each answer's tokens, and how many tokens it has. All [P]."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def mean_chosen(self) -> Tensor:
        """log p per token of the chosen answers."""
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        """log p per token of the rejected answers."""
        return self.rejected / self.rejected_tokens


def dpo(policy: Answers, reference: Answers, *, beta: float, label_smoothing: float) -> Tensor:
    """Direct preference optimisation; `label_smoothing` is the share of labels taken for wrong."""
    h = beta * _ratios(policy, reference)
    return -logsigmoid(h) * (1 - label_smoothing) - logsigmoid(-h) * label_smoothing


def ipo(policy: Answers, reference: Answers, *, beta: float) -> Tensor:
    """A regression of the mean log ratios' difference to 1 / (2 beta)."""
    chosen = policy.mean_chosen - reference.mean_chosen
    rejected = policy.mean_rejected - reference.mean_rejected
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo(policy: Answers, *, beta: float, gamma: float) -> Tensor:
    """No reference; `gamma` is the margin by which the chosen answer should be likelier."""
    return -logsigmoid(beta * (policy.mean_chosen - policy.mean_rejected) - gamma)


def orpo(policy: Answers, *, beta: float) -> Tensor:
    """No reference: likelihood of the chosen answers, and `beta` times an odds ratio."""
    odds = _log_odds(policy.mean_chosen) - _log_odds(policy.mean_rejected)
    return -policy.mean_chosen - beta * logsigmoid(odds)


def _ratios(policy: Answers, reference: Answers) -> Tensor:
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)); p of a whole answer's mean is below 1."""
    return log_p - torch.log1p(-log_p.exp())

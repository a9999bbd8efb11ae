"""Experience of pairs: the preferred answer and the other one, side by side, with a reference.

Online AI feedback (arXiv 2402.04792): two answers of the policy as it is, a judge's preference, and
an offline objective of pairs, here by `training/pairs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from equilibrium_mcore.objectives.mismatch import Mismatch
from equilibrium_mcore.online.answers import Answer, Packed
from equilibrium_mcore.online.estimate import Reference
from equilibrium_mcore.online.experience import answers_of, mismatch_of, packed_for, scored
from equilibrium_mcore.online.rollouts import Group
from equilibrium_mcore.training.pairs import REFERENCE
from equilibrium_mcore.training.policy_objective import OLD
from equilibrium_mcore.training.scoring import log_probabilities
from equilibrium_mcore.training.setup import Run

SIDES = 2


class PairEstimator:
    """Answers 2n and 2n + 1 are the chosen and the rejected one of pair n; an Estimator.

    A pair without a preference does not count. It keeps nothing from rollout to rollout.
    """

    def __init__(self, *, temperature: float, reference: Reference | None) -> None:
        """`reference` gives log p of every label, as the objective's losses have it."""
        self._temperature, self._reference = temperature, reference

    def experience(
        self, run: Run, groups: Sequence[Group]
    ) -> tuple[list[Answer], dict[str, float]]:
        """See Estimator; with `ties`, the share of pairs without a preference where the judge did
        not fail, and `chosen_longer`, the share of those with one whose chosen answer is longer.
        """
        answers = answers_of(groups, masked=False)
        apart = self._mismatch(run, answers)
        answers = [replace(answer, values={}) for answer in in_order(answers, groups)]
        figures = {
            "mismatch_mean": apart.mean,
            "mismatch_max": apart.largest,
            "mismatch_k3": apart.k3,
            **_shares(groups, answers),
        }
        if self._reference is not None:
            ours = self._reference
            packed = packed_pairs(run, answers)
            found = scored(run, packed, lambda batches: ours(run, batches))
            answers = [a.with_values(**{REFERENCE: v}) for a, v in zip(answers, found, strict=True)]
        return answers, figures

    def ready(self, objective: Any) -> None:
        """See Estimator."""

    def state(self) -> dict[str, Any]:
        """See Estimator."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """See Estimator."""

    def _mismatch(self, run: Run, answers: Sequence[Answer]) -> Mismatch:
        """How far engine and training are apart; nothing is corrected, since no ratio is taken."""

        def policy(batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
            return log_probabilities(run, batches, temperature=self._temperature)

        old = scored(run, packed_for(run, answers), policy)
        return mismatch_of([a.with_values(**{OLD: v}) for a, v in zip(answers, old, strict=True)])


def in_order(answers: Sequence[Answer], groups: Sequence[Group]) -> list[Answer]:
    """The preferred answer of each group first; those of a group without a preference uncounted.

    Without the support that they were drawn from: objectives of pairs are of the whole vocabulary,
    and so the reference's part of a ratio must be.
    """
    found: list[Answer] = []
    for place, group in enumerate(groups):
        pair = list(answers[SIDES * place : SIDES * (place + 1)])
        first, second = group.verdicts
        if first.reward < second.reward:
            pair.reverse()
        found += [replace(answer, counts=not group.is_dead, support=None) for answer in pair]
    return found


def packed_pairs(run: Run, answers: Sequence[Answer]) -> Packed:
    """The pairs in sequences, whose `answer` is as `data.chat.preferences` makes it."""
    return number_pairs(packed_for(run, answers, together=SIDES), answers)


def number_pairs(packed: Packed, answers: Sequence[Answer]) -> Packed:
    """With int64 `answer` [length]: 1 + 2 n at labels of the chosen answer of the sequence's pair
    n, 2 + 2 n of the rejected, of the pairs that count; 0 elsewhere."""
    seen = [0] * len(packed.sequences)
    for sequence in packed.sequences:
        sequence["answer"] = torch.zeros_like(sequence["tokens"])
    for number in range(0, len(answers), SIDES):
        if not answers[number].counts:
            continue
        for place in packed.places[number : number + SIDES]:
            seen[place.sequence] += 1
            here = slice(place.start, place.start + place.length)
            packed.sequences[place.sequence]["answer"][here] = seen[place.sequence]
    return packed


def _shares(groups: Sequence[Group], answers: Sequence[Answer]) -> dict[str, float]:
    judged = [g for g in groups if all(v.verdict != "error" for v in g.verdicts)]
    chosen, rejected = answers[::SIDES], answers[1::SIDES]
    decided = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a.counts]
    return {
        "ties": _mean([group.is_dead for group in judged]),
        "chosen_longer": _mean([a.length > b.length for a, b in decided]),
    }


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0

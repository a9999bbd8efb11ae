"""Experience by a critic: advantages of tokens, and the returns that its values are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.objectives.advantages import whitened
from equilibrium_mcore.objectives.truncation import Outcomes, outcomes
from equilibrium_mcore.objectives.value import (
    Estimates,
    explained_variance,
    gae,
    token_rewards,
)
from equilibrium_mcore.online.answers import Answer
from equilibrium_mcore.online.critic import Critic
from equilibrium_mcore.online.estimate import RewardEstimator, k1_of
from equilibrium_mcore.online.experience import answers_of, packed_for, scored
from equilibrium_mcore.online.rollouts import Group
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.value_objective import RETURNS, VALUES


class CriticEstimator(RewardEstimator):
    """Generalised advantage estimation over the produced tokens of each answer."""

    def __init__(self, *arguments: Any, critic: Critic, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._critic = critic

    def experience(
        self, run: Run, groups: Sequence[Group]
    ) -> tuple[list[Answer], dict[str, float]]:
        """See Estimator. Raises MismatchError."""
        answers = answers_of(groups, masked=self._settings.truncated == "mask")
        answers, figures = self._measured(run, answers)
        values, after = self._valued(run, answers)
        pairs = [pair for g in groups for pair in zip(g.rollouts, g.verdicts, strict=True)]
        ends = outcomes(
            torch.tensor([verdict.reward for _, verdict in pairs], dtype=torch.float64),
            torch.tensor([rollout.finish == "length" for rollout, _ in pairs]),
            way=self._settings.truncated,
            after=after,
        )
        found = self._estimates(answers, values, ends)
        lengths = [answer.length for answer in answers]
        counts = torch.tensor([a.counts for a in answers]).repeat_interleave(torch.tensor(lengths))
        advantages = torch.where(counts, found.advantages, 0.0)
        if self._settings.scale == "batch" and bool(counts.any()):
            advantages[counts] = whitened(advantages[counts])
        if (bound := self._settings.advantage_bound) is not None:
            advantages = advantages.clamp(-bound, bound)
        if self._reference is not None:
            self.coefficient.update(figures["kl_reference"], answers=len(answers))
        figures |= {
            "explained_variance": explained_variance(values[counts], found.returns[counts]),
            "value_mean": float(values[counts].mean()) if bool(counts.any()) else 0.0,
        }
        valued = [
            answer.with_values(**{VALUES: v, RETURNS: r})
            for answer, v, r in zip(
                answers, _cut(values, lengths), _cut(found.returns, lengths), strict=True
            )
        ]
        return self._weighted(valued, _cut(advantages, lengths)), figures

    def _valued(self, run: Run, answers: list[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
        """The critic's values where tokens were drawn [N], and after each answer's last [R]."""
        packed = packed_for(run, answers)
        longer = [place._replace(length=place.length + 1) for place in packed.places]
        found = scored(run, packed._replace(places=longer), self._critic.values)
        values = np.concatenate([row[:-1] for row in found])
        return torch.from_numpy(values), torch.tensor([float(row[-1]) for row in found])

    def _estimates(
        self, answers: Sequence[Answer], values: torch.Tensor, ends: Outcomes
    ) -> Estimates:
        lengths = torch.tensor([answer.length for answer in answers])
        numbers = torch.arange(len(answers)).repeat_interleave(lengths)
        produced = torch.ones(len(numbers), dtype=torch.int64)
        penalties = None
        if self._reference is not None and self._settings.kl.place == "reward":
            k1 = torch.from_numpy(np.concatenate([k1_of(answer) for answer in answers]))
            penalties = self.coefficient.value * k1
        settings = self._settings.critic
        assert settings is not None
        return gae(
            token_rewards(ends.scores, produced, numbers, penalties=penalties),
            values,
            produced,
            numbers,
            bootstraps=ends.bootstraps,
            gamma=settings.gamma,
            trace_decay=settings.trace_decay,
        )


def _cut(values: torch.Tensor, lengths: Sequence[int]) -> list[np.ndarray]:
    """float32, of each answer."""
    return [part.numpy() for part in values.to(torch.float32).split(list(lengths))]

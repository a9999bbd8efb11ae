"""Experience by a teacher: what it thinks of each token that the policy drew, and no reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.objectives.advantages import teachers, whitened
from equilibrium_mcore.online.answers import Answer
from equilibrium_mcore.online.estimate import Reference, RewardEstimator
from equilibrium_mcore.online.experience import answers_of, packed_for, scored
from equilibrium_mcore.online.rollouts import Group
from equilibrium_mcore.training.policy_objective import OLD
from equilibrium_mcore.training.setup import Run


class TeacherEstimator(RewardEstimator):
    """On-policy distillation: each token's advantage is the teacher's log p less the policy's."""

    def __init__(self, *arguments: Any, teacher: Reference, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._teacher = teacher

    def experience(
        self, run: Run, groups: Sequence[Group]
    ) -> tuple[list[Answer], dict[str, float]]:
        """See Estimator. Raises MismatchError."""
        answers = answers_of(groups, masked=self._settings.truncated == "mask")
        answers, figures = self._measured(run, answers)
        found = scored(run, packed_for(run, answers), lambda batches: self._teacher(run, batches))
        of_teacher, old = (
            torch.from_numpy(np.concatenate(rows))
            for rows in (found, [answer.values[OLD] for answer in answers])
        )
        advantages = teachers(of_teacher, old)
        figures["kl_teacher"] = -float(advantages.mean())
        if self._settings.scale == "batch":
            advantages = whitened(advantages)
        if (bound := self._settings.advantage_bound) is not None:
            advantages = advantages.clamp(-bound, bound)
        if self._reference is not None:
            self.coefficient.update(figures["kl_reference"], answers=len(answers))
        cut = advantages.split([answer.length for answer in answers])
        return self._weighted(answers, [part.numpy() for part in cut]), figures

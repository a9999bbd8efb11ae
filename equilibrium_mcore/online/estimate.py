"""From scored answers to experience: what each token is to be changed by.

Log-probabilities are taken here, from the training forward at the policy that drew the answers, and
so before the first update on them: at it every ratio is 1, whatever the engine's rounding. The
difference to the engine's is measured, corrected, and refused where it is large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.objectives.advantages import Scores, advantages
from equilibrium_mcore.objectives.kl import ESTIMATORS, Adaptive, Coefficient, Fixed, penalised
from equilibrium_mcore.objectives.mismatch import CORRECTIONS as WAYS
from equilibrium_mcore.objectives.trackers import TRACKERS, PromptTracker, Tracker
from equilibrium_mcore.objectives.truncation import outcomes
from equilibrium_mcore.online.answers import Answer
from equilibrium_mcore.online.experience import (
    SAMPLED,
    answers_of,
    mismatch_of,
    packed_for,
    scored,
)
from equilibrium_mcore.online.rollouts import Group
from equilibrium_mcore.training.pairs import REFERENCE
from equilibrium_mcore.training.policy_objective import ADVANTAGES, CORRECTIONS, OLD
from equilibrium_mcore.training.scoring import log_probabilities
from equilibrium_mcore.training.setup import Run

Reference = Callable[[Run, list[Batch]], list[torch.Tensor]]


class MismatchError(RuntimeError):
    """The engine's log-probabilities are not those of the policy that is trained."""

    is_told = True  # it says by itself what to do


class Estimator(Protocol):
    """The seam between rollouts and updates."""

    def experience(
        self, run: Run, groups: Sequence[Group]
    ) -> tuple[list[Answer], dict[str, float]]:
        """The answers with all values that the objective needs, and figures. Collective."""

    def ready(self, objective: Any) -> None:
        """Tell the objective what changes from rollout to rollout, before each step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values, the same on every rank."""

    def load(self, state: dict[str, Any]) -> None:
        """As it was."""


@dataclass(frozen=True)
class Earned:
    """Of each answer, in the order of the rollout: what it earned, and its prompt's key."""

    rewards: torch.Tensor  # float64 [R]
    groups: torch.Tensor  # int64 [R]
    keys: list[int]


class RewardEstimator:
    """Advantages of whole answers: a reward less a baseline, the same at each of their tokens."""

    def __init__(
        self,
        settings: PolicyConfig,
        *,
        temperature: float,
        reference: Reference | None,
    ) -> None:
        """`reference` gives log p of every label of batches at a temperature of `temperature`."""
        self._settings, self._temperature = settings, temperature
        self._reference = reference
        kl = settings.kl
        self.coefficient: Coefficient = (
            Adaptive(kl.coefficient, target=kl.target, horizon=kl.horizon)
            if kl.controller == "adaptive"
            else Fixed(kl.coefficient)
        )
        self.tracker: Tracker | None = None
        self._before: list[Answer] = []  # of the rollout before, by which a drift is measured
        if settings.advantage == "tracker":
            values = settings.tracker.model_dump()
            self.tracker = TRACKERS[values.pop("form")](**values)

    def experience(
        self, run: Run, groups: Sequence[Group]
    ) -> tuple[list[Answer], dict[str, float]]:
        """See Estimator. Raises MismatchError."""
        answers = answers_of(groups, masked=self._settings.truncated == "mask")
        answers, figures = self._measured(run, answers)
        earned = self._earned(groups, answers)
        counts = torch.tensor([answer.counts for answer in answers])
        found = torch.zeros(len(answers), dtype=torch.float64)
        if bool(counts.any()):
            found[counts] = self._advantages(earned, counts)
        if self._reference is not None:
            self.coefficient.update(figures["kl_reference"], answers=len(answers))
        if self.tracker is not None and bool(counts.any()):
            self._track(run, earned, counts, answers, figures)
        spread = [np.full(a.length, v) for a, v in zip(answers, found.tolist(), strict=True)]
        return self._weighted(answers, spread), figures

    def ready(self, objective: Any) -> None:
        """See Estimator."""
        objective.temperature = self._temperature
        objective.kl_coefficient = self.coefficient.value

    def state(self) -> dict[str, Any]:
        """See Estimator."""
        tracker = None if self.tracker is None else self.tracker.state()
        return {
            "coefficient": self.coefficient.state(),
            "tracker": tracker,
            "before": [answer.as_plain() for answer in self._before],
        }

    def load(self, state: dict[str, Any]) -> None:
        """See Estimator."""
        self.coefficient.load(state["coefficient"])
        if self.tracker is not None and state["tracker"] is not None:
            self.tracker.load(state["tracker"])
            self._before = [Answer.from_plain(plain) for plain in state["before"]]

    # ------------------------------------------------------------------------------ the inside

    def _measured(self, run: Run, answers: list[Answer]) -> tuple[list[Answer], dict[str, float]]:
        """With log p of the policy and of the reference; how far apart engine and training are."""
        packed = packed_for(run, answers)
        old = scored(run, packed, lambda batches: self._policy(run, batches))
        answers = [a.with_values(**{OLD: v}) for a, v in zip(answers, old, strict=True)]
        apart = mismatch_of(answers)
        figures = {
            "mismatch_mean": apart.mean,
            "mismatch_max": apart.largest,
            "mismatch_k3": apart.k3,
        }
        most = self._settings.mismatch.refuse_above_mean
        if most is not None and not apart.mean <= most:
            raise MismatchError(
                f"step {run.progress.step + 1}: log-probabilities of the engine and of training "
                f"differ by {apart.mean:.3g} on average, and objective.mismatch.refuse_above_mean="
                f"{most:g}: what was sampled is not what is trained. Find the cause before raising "
                "it; a lower precision of weights or kernels is the usual one"
            )
        if self._reference is not None:
            ours = self._reference
            found = scored(run, packed, lambda batches: ours(run, batches))
            answers = [a.with_values(**{REFERENCE: v}) for a, v in zip(answers, found, strict=True)]
            divergence = _mean_k1(answers)
            figures |= {"kl_reference": divergence, "kl_coefficient": self.coefficient.value}
        return answers, figures

    def _policy(self, run: Run, batches: list[Batch]) -> list[torch.Tensor]:
        return log_probabilities(run, batches, temperature=self._temperature)

    def _earned(self, groups: Sequence[Group], answers: Sequence[Answer]) -> Earned:
        """Rewards, less the divergence where it is a cost."""
        pairs = [pair for g in groups for pair in zip(g.rollouts, g.verdicts, strict=True)]
        rewards = torch.tensor([verdict.reward for _, verdict in pairs], dtype=torch.float64)
        cut = torch.tensor([rollout.finish == "length" for rollout, _ in pairs])
        rewards = outcomes(rewards, cut, way=self._settings.truncated).scores
        if self._reference is not None and self._settings.kl.place == "reward":
            sums = torch.tensor([float(k1_of(answer).sum()) for answer in answers])
            rewards = penalised(rewards, sums, coefficient=self.coefficient.value)
        places = torch.tensor([answer.group for answer in answers])
        return Earned(rewards, places, [rollout.request.prompt.key for rollout, _ in pairs])

    def _advantages(self, earned: Earned, counts: torch.Tensor) -> torch.Tensor:
        """Of the answers that count, among which alone the statistics are."""
        baselines = None
        if self.tracker is not None:
            baselines = self.tracker.baselines(earned.keys)[counts]
        scores = Scores(earned.rewards[counts], earned.groups[counts], baselines)
        settings = self._settings
        return advantages(
            scores,
            baseline=settings.advantage,
            scale=settings.scale,
            bound=settings.advantage_bound,
        )

    def _track(
        self,
        run: Run,
        earned: Earned,
        counts: torch.Tensor,
        answers: Sequence[Answer],
        figures: dict[str, float],
    ) -> None:
        keys = [key for key, here in zip(earned.keys, counts.tolist(), strict=True) if here]
        old = np.concatenate([answer.values[OLD] for answer in answers])
        mean = float(np.mean(old, dtype=np.float64))
        drift = 0.0
        if isinstance(self.tracker, PromptTracker):
            drift = figures["tracker_drift"] = self._drift(run)
            self._before = [replace(a, values={OLD: a.values[OLD]}) for a in answers]
        self.tracker.update(keys, earned.rewards[counts], log_p=mean, drift=drift)
        figures["tracker_baseline"] = float(self.tracker.baselines(keys).mean())

    def _drift(self, run: Run) -> float:
        """KL per token, in nats, by which the policy moved since the last rollout: k3 on that."""
        if not self._before:
            return 0.0
        found = scored(run, packed_for(run, self._before), lambda b: self._policy(run, b))
        then = np.concatenate([answer.values[OLD] for answer in self._before], dtype=np.float64)
        moved = np.concatenate(found, dtype=np.float64) - then
        return float((np.expm1(moved) - moved).mean())

    def _weighted(self, answers: Sequence[Answer], found: Sequence[np.ndarray]) -> list[Answer]:
        """With the advantage and the correction of each token, [m] of each answer."""
        mismatch = self._settings.mismatch
        correct = WAYS[mismatch.correction]
        done = []
        for answer, advantage in zip(answers, found, strict=True):
            old, sampled = (torch.from_numpy(answer.values[n].copy()) for n in (OLD, SAMPLED))
            weights = correct(old, sampled, mismatch.low, mismatch.high).numpy()
            of_tokens = {ADVANTAGES: advantage.astype(np.float32), CORRECTIONS: weights}
            done.append(answer.with_values(**of_tokens))
        return done


def k1_of(answer: Answer) -> np.ndarray:
    """Of each produced token, float64 [m]: log p of the policy less that of the reference."""
    log_p, reference = (torch.from_numpy(answer.values[n].copy()) for n in (OLD, REFERENCE))
    return ESTIMATORS["k1"](log_p, reference, log_p).double().numpy()


def _mean_k1(answers: Sequence[Answer]) -> float:
    """Nats per produced token."""
    return float(np.concatenate([k1_of(answer) for answer in answers]).mean())

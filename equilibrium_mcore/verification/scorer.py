"""Scores texts: every reward of the settings, in worker processes, in the order they were given.

with Scorer(parse_rewards([{"type": "math_answer"}])) as scorer:
    scored = scorer.score([Example(text="... \\boxed{4}", truth="4")])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.rewards import ON_RANKS, RewardsConfig, reward_name
from equilibrium_mcore.processes.threads import available_cores
from equilibrium_mcore.verification.error_share import ErrorShare, TooManyErrorsError
from equilibrium_mcore.verification.pool import KillablePool, Outcome, Task, WorkerRefusedError
from equilibrium_mcore.verification.registry import AT_ONCE, build_reward
from equilibrium_mcore.verification.scored import (
    Example,
    Part,
    RewardError,
    Scored,
    combine,
    shown,
)

HOUR = 3600.0  # where a reward keeps its own time, for a hang alone
SHOWN_ERRORS = 3


class Scorer:
    """Rewards with their workers. Close it, or use it as a context."""

    def __init__(self, config: RewardsConfig) -> None:
        """Start the workers.

        Raises ConfigError for a reward that cannot work here: a missing library, function or
        sandbox. `notes` are what a user should know of how they were built.
        """
        if found := [reward_name(reward) for reward in config.rewards if reward.type in ON_RANKS]:
            raise ConfigError(
                f"rewards: {', '.join(found)}: a model scores answers on the ranks of a run, not "
                "texts of a file; name it in the rewards of a run's config"
            )
        self._config = config
        self._names = [reward_name(reward) for reward in config.rewards]
        self._weights = dict(zip(self._names, (r.weight for r in config.rewards), strict=True))
        self._at_once = {
            number: build_reward(reward)
            for number, reward in enumerate(config.rewards)
            if reward.type in AT_ONCE
        }
        self._errors = ErrorShare(config.max_error_share, config.error_window)
        self._seen = 0
        self._pool: KillablePool | None = None
        self.notes: list[str] = []
        if len(self._at_once) < len(config.rewards):
            self._pool = self._start()
            self.notes = list(self._pool.greeting["notes"])

    def _start(self) -> KillablePool:
        values = [reward.model_dump(mode="json") for reward in self._config.rewards]
        count = self._config.reward_workers or available_cores()
        try:
            return KillablePool(count, values)
        except WorkerRefusedError as error:
            raise ConfigError(f"rewards: {error}") from None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()

    def score(self, examples: Sequence[Example]) -> list[Scored]:
        """What each example is worth, in their order.

        Raises TooManyErrorsError where more of the last `error_window` than `max_error_share` had
        the verdict `error`, RewardError where a plug-in does not return what it has to.
        """
        places = [
            (example, number)
            for example in range(len(examples))
            for number in range(len(self._names))
            if number not in self._at_once
        ]
        tasks = [self._task(number, examples[example]) for example, number in places]
        outcomes = self._pool.run(tasks) if self._pool is not None else []
        judged = {
            place: self._part(place[1], outcome)
            for place, outcome in zip(places, outcomes, strict=True)
        }
        scored = [
            combine(example, self._parts(number, example, judged), self._weights)
            for number, example in enumerate(examples)
        ]
        self._count_errors(scored)
        return scored

    def _task(self, number: int, example: Example) -> Task:
        reward = self._config.rewards[number]
        return Task(
            {"reward": number, "example": asdict(example)},
            seconds=getattr(reward, "seconds", HOUR),
            wall_seconds=getattr(reward, "wall_seconds", HOUR),
        )

    def _part(self, number: int, outcome: Outcome) -> Part:
        """A worker's reply; a worker that was killed or died is a verdict as well."""
        if "fatal" in outcome.reply:
            raise RewardError(outcome.reply["fatal"])
        if outcome.status == "done":
            return Part(**outcome.reply)
        verdict = "timeout" if outcome.status == "timeout" else "error"
        return Part(self._names[number], 0.0, verdict, reason=outcome.reason)

    def _parts(self, place: int, example: Example, judged: dict[Any, Part]) -> list[Part]:
        """In the order of the settings."""
        at_once = {number: reward.score(example) for number, reward in self._at_once.items()}
        return [
            at_once[number] if number in at_once else judged[place, number]
            for number in range(len(self._names))
        ]

    def _count_errors(self, scored: Sequence[Scored]) -> None:
        first = self._seen
        self._seen += len(scored)
        if (problem := self._errors.problem([one.verdict == "error" for one in scored])) is None:
            return
        raise TooManyErrorsError(
            f"{problem}: a verifier or its data is broken, and rewards of 0 would teach that right "
            f"answers are wrong.\n{_some_errors(scored, first)}",
            scored,
        )


def _some_errors(scored: Sequence[Scored], first: int) -> str:
    """The first errors of a batch, each with its example and reward."""
    lines = []
    for number, one in enumerate(scored, start=first):
        for name, part in one.details.items():
            if part.verdict == "error":
                key = f" ({one.example.key})" if one.example.key else ""
                lines.append(f"  example {number}{key}, reward {name}: {shown(part.reason)}")
    more = len(lines) - SHOWN_ERRORS
    return "\n".join(lines[:SHOWN_ERRORS] + ([f"  and {more} more"] if more > 0 else []))

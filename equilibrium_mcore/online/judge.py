"""What answers are worth: one rank judges all of them, and tells the others.

Rewards that are models score on all ranks; their parts are added to the verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from equilibrium_mcore.checkpoint.together import on_first_rank
from equilibrium_mcore.config.rewards import ON_RANKS, RewardsConfig
from equilibrium_mcore.data.chat.prompts import EncodedPrompt
from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.generation.interface import Rollout
from equilibrium_mcore.verification.error_share import ErrorShare, TooManyErrorsError
from equilibrium_mcore.verification.scored import Example, Part, worst
from equilibrium_mcore.verification.scorer import Scorer


class Verdict(NamedTuple):
    """A judgement as it travels between ranks; see `verification.scored.Scored`."""

    reward: float
    verdict: str
    parts: dict[str, float]
    answer_text: str

    def with_part(self, part: Part, weight: float) -> Verdict:
        """With what a further reward says."""
        return Verdict(
            self.reward + weight * part.value,
            worst((self.verdict, part.verdict)),
            {**self.parts, part.name: part.value},
            self.answer_text or part.answer,
        )


NOTHING = Verdict(0.0, "ok", {}, "")


class RankReward(Protocol):
    """A reward that needs the ranks of the run."""

    name: str
    weight: float

    def __call__(self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]) -> list[Part]:
        """What it says of `rollouts[n]` as an answer to `prompts[n]`, on every rank. Collective."""


class Judge:
    """Rewards of rollouts. Its methods are collective; rank 0 alone has workers."""

    def __init__(
        self,
        config: RewardsConfig,
        tokenizer: Tokenizer,
        *,
        first_rank: bool,
        rank_rewards: Sequence[RankReward] = (),
    ) -> None:
        """`rank_rewards` are those of `config` that rank 0 cannot find alone.

        Raises ConfigError, on every rank, for a reward that cannot work here.
        """
        self._tokenizer = tokenizer
        self._scorer: Scorer | None = None
        self._rank_rewards = list(rank_rewards)
        self._errors = ErrorShare(config.max_error_share, config.error_window, unit="answers")
        plain = [reward for reward in config.rewards if reward.type not in ON_RANKS]
        self._has_plain = bool(plain)

        def start() -> list[str]:
            if not plain:
                return []
            self._scorer = Scorer(config.model_copy(update={"rewards": plain}))
            return self._scorer.notes

        self.notes = on_first_rank(start)
        self._is_first = first_rank

    def __call__(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Verdict]:
        """Verdicts of `rollouts[n]` as an answer to `prompts[n]`, the same on every rank.

        Raises what `Scorer.score` does, on every rank.
        """
        verdicts = [NOTHING] * len(rollouts)
        if self._has_plain:
            verdicts = on_first_rank(lambda: self._judged(prompts, rollouts))
        for reward in self._rank_rewards:
            parts = reward(prompts, rollouts)
            self._count_errors(reward.name, parts)
            verdicts = [
                verdict.with_part(part, reward.weight)
                for verdict, part in zip(verdicts, parts, strict=True)
            ]
        return verdicts

    def close(self) -> None:
        """End the workers."""
        if self._scorer is not None:
            self._scorer.close()

    def _count_errors(self, name: str, parts: Sequence[Part]) -> None:
        failed = [part.verdict == "error" for part in parts]
        if (problem := self._errors.problem(failed)) is not None:
            reason = next((part.reason for part in parts if part.verdict == "error"), "")
            raise TooManyErrorsError(f"{problem}: reward {name}: {reason}")

    def _judged(self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]) -> list[Any]:
        assert self._scorer is not None
        examples = [
            Example(
                text=text_of(self._tokenizer, rollout.ids),
                truth=prompt.truth,
                prompt=prompt.text,
                key=f"{rollout.request.prompt.key:016x}/{rollout.request.sample}",
                length=len(rollout.ids),
            )
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        return [
            Verdict(one.reward, one.verdict, one.parts, one.answer_text)
            for one in self._scorer.score(examples)
        ]


class Unjudged:
    """In place of a Judge where rewards are not asked for: every answer is worth 0."""

    notes: tuple[str, ...] = ()

    def __call__(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Verdict]:
        """See Judge."""
        return [NOTHING for _ in rollouts]

    def close(self) -> None:
        """See Judge."""


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """What was answered, for rewards and readers; the token that ends an answer leaves no text.

    It is never encoded again: what trains are the ids.
    """
    return tokenizer.decode([int(index) for index in ids])

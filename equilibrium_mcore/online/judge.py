"""What answers are worth: one rank judges all of them, and tells the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from equilibrium_mcore.checkpoint.together import on_first_rank
from equilibrium_mcore.config.rewards import RewardsConfig
from equilibrium_mcore.data.chat.prompts import EncodedPrompt
from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.generation.interface import Rollout
from equilibrium_mcore.verification.scored import Example
from equilibrium_mcore.verification.scorer import Scorer


class Verdict(NamedTuple):
    """A judgement as it travels between ranks; see `verification.scored.Scored`."""

    reward: float
    verdict: str
    parts: dict[str, float]
    answer_text: str


class Judge:
    """Rewards of rollouts. Its methods are collective; rank 0 alone has workers."""

    def __init__(self, config: RewardsConfig, tokenizer: Tokenizer, *, first_rank: bool) -> None:
        """Raises ConfigError, on every rank, for a reward that cannot work here."""
        self._tokenizer = tokenizer
        self._scorer: Scorer | None = None

        def start() -> list[str]:
            self._scorer = Scorer(config)
            return self._scorer.notes

        self.notes = on_first_rank(start)
        self._is_first = first_rank

    def __call__(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Verdict]:
        """Verdicts of `rollouts[n]` as an answer to `prompts[n]`, the same on every rank.

        Raises what `Scorer.score` does, on every rank.
        """
        return on_first_rank(lambda: self._judged(prompts, rollouts))

    def close(self) -> None:
        """End the workers."""
        if self._scorer is not None:
            self._scorer.close()

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
        return [Verdict(0.0, "ok", {}, "") for _ in rollouts]

    def close(self) -> None:
        """See Judge."""


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """What was answered, for rewards and readers; the token that ends an answer leaves no text.

    It is never encoded again: what trains are the ids.
    """
    return tokenizer.decode([int(index) for index in ids])

"""A judge of a policy's own pairs: verdicts of answers, by which of two is preferred.

The answer that is preferred is worth 1, the other one 0; in a tie both are worth 0.5. So a pair
without a preference is a dead group like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from equilibrium_mcore.checkpoint.together import on_first_rank
from equilibrium_mcore.config.judges import HttpJudgeConfig, ModelJudgeConfig
from equilibrium_mcore.data.chat.prompts import EncodedPrompt
from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.generation.interface import Rollout
from equilibrium_mcore.online.judge import Verdict, text_of
from equilibrium_mcore.online.model_reward import ModelScores
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.verification.http_judge import HttpJudge
from equilibrium_mcore.verification.pairwise import Compared, Question

WORTH = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5), "error": (0.0, 0.0)}
SWAYED = "swayed"  # a part: whether the pair was decided by the place of the answers
# Prompts and rollouts, two after each other; a judgement of each pair. Collective.
Compare = Callable[[Sequence[EncodedPrompt], Sequence[Rollout]], list[Compared]]


class PairJudge:
    """Verdicts of rollouts, of which each two after each other answer one prompt. Collective."""

    notes: tuple[str, ...] = ()

    def __init__(self, compare: Compare) -> None:
        self._compare = compare

    def __call__(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Verdict]:
        """See Judge."""
        return [
            verdict
            for compared in self._compare(prompts, rollouts)
            for verdict in verdicts_of(compared)
        ]

    def close(self) -> None:
        """See Judge."""


def verdicts_of(compared: Compared) -> list[Verdict]:
    """Of the first answer and of the second."""
    verdict = "error" if compared.preference == "error" else "ok"
    said = compared.reason or compared.preference
    return [
        Verdict(
            worth,
            verdict,
            {SWAYED: float(compared.swayed)} | {n: v[side] for n, v in compared.parts.items()},
            said,
        )
        for side, worth in enumerate(WORTH[compared.preference])
    ]


class TextComparison:
    """What a judge of texts says, which rank 0 asks."""

    def __init__(self, config: HttpJudgeConfig, tokenizer: Tokenizer) -> None:
        """Raises ConfigError, on every rank, for a judge that cannot be asked."""
        self._tokenizer = tokenizer
        self._judge: HttpJudge | None = None

        def start() -> None:
            self._judge = HttpJudge(config)

        on_first_rank(start)

    def __call__(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Compared]:
        """See Compare."""
        return on_first_rank(lambda: self._asked(prompts, rollouts))

    def _asked(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Compared]:
        assert self._judge is not None
        texts = [text_of(self._tokenizer, rollout.ids) for rollout in rollouts]
        pairs = zip(prompts[::2], texts[::2], texts[1::2], strict=True)
        return self._judge([Question(prompt.text, *both) for prompt, *both in pairs])


class ScoreComparison:
    """What a reward model prefers, on all ranks."""

    def __init__(self, run: Run, config: ModelJudgeConfig) -> None:
        """Raises what ModelScores does."""
        self._scores = ModelScores(run, config.weights, key="judge.weights")
        self._margin = config.tie_margin

    def __call__(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Compared]:
        """See Compare."""
        scores = self._scores(rollouts)
        return [
            by_score(*both, margin=self._margin)
            for both in zip(scores[::2], scores[1::2], strict=True)
        ]


def by_score(first: float, second: float, *, margin: float) -> Compared:
    """The larger score is preferred; those that differ by at most `margin` are a tie."""
    parts = {"score": (first, second)}
    if not math.isfinite(first) or not math.isfinite(second):
        nothing = {"score": (0.0, 0.0)}
        return Compared("error", reason=f"scores of {first} and {second}", parts=nothing)
    if abs(first - second) <= margin:
        return Compared("tie", parts=parts)
    return Compared("first" if first > second else "second", parts=parts)


def compare_of(run: Run, tokenizer: Tokenizer) -> Compare:
    """The judge that the run names. Collective."""
    config = run.config.judge
    if isinstance(config, ModelJudgeConfig):
        return ScoreComparison(run, config)
    assert isinstance(config, HttpJudgeConfig)
    return TextComparison(config, tokenizer)

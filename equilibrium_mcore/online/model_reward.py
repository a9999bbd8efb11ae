"""What a reward model thinks of answers: a frozen model in the run's layout scores their ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from equilibrium_mcore.checkpoint.choose import find_weights
from equilibrium_mcore.checkpoint.opened import inspect
from equilibrium_mcore.config.rewards import ModelRewardConfig, reward_name
from equilibrium_mcore.data.chat.prompts import EncodedPrompt
from equilibrium_mcore.generation.interface import Rollout
from equilibrium_mcore.online.answers import Answer, Packed
from equilibrium_mcore.online.experience import packed_for, scored
from equilibrium_mcore.training.frozen import load_frozen
from equilibrium_mcore.training.frozen_settings import check_reward_model
from equilibrium_mcore.training.scoring import scalar_values
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.verification.scored import Part


class ModelScores:
    """Scores of rollouts, the same on every rank. All methods are collective."""

    def __init__(self, run: Run, weights: Path, *, key: str) -> None:
        """Load the reward model in `weights`, which the setting `key` names.

        Raises ConfigError for weights that are not there, give no scores, were trained on another
        tokenizer, or do not fit the layout.
        """
        opened = inspect(find_weights(weights, key=key), needs_state=False)
        check_reward_model(opened, run.config, key=key)
        self._run = run
        self._chunks = load_frozen(weights, config=run.config, groups=run.groups, key=key)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The value at the last produced token of each, where the model learned to score."""
        if not rollouts:
            return []
        run, chunks = self._run, self._chunks
        packed = at_last_tokens(packed_for(run, [_answer(rollout) for rollout in rollouts]))
        found = scored(run, packed, lambda batches: scalar_values(run, batches, chunks=chunks))
        return [float(values[0]) for values in found]


def at_last_tokens(packed: Packed) -> Packed:
    """The same sequences; each answer's place is that of its last token, which it predicts no more.

    By index: neither padding nor an end token within the answer is looked at.
    """
    places = [p._replace(start=p.start + p.length, length=1) for p in packed.places]
    return packed._replace(places=places)


def _answer(rollout: Rollout) -> Answer:
    prompt = rollout.request.prompt.ids
    ids = np.concatenate([prompt, rollout.ids]).astype(np.int32)
    return Answer(ids, prompt_length=len(prompt), group=0)


class ModelReward:
    """Reward `reward_model`: a RankReward."""

    def __init__(self, run: Run, config: ModelRewardConfig, *, key: str) -> None:
        """Raises what ModelScores does."""
        self.name, self.weight, self._bound = reward_name(config), config.weight, config.bound
        self._scores = ModelScores(run, config.weights, key=key)

    def __call__(self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]) -> list[Part]:
        """See RankReward."""
        return [self._part(score) for score in self._scores(rollouts)]

    def _part(self, score: float) -> Part:
        if not math.isfinite(score):
            return Part(self.name, 0.0, "error", reason=f"the model gave {score}")
        if self._bound is not None:
            score = min(max(score, -self._bound), self._bound)
        return Part(self.name, score)

"""How a policy answers prompts in training, and how its progress is measured.

What answers are worth is in `rewards.py`, what is made of that in `policy.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from equilibrium_mcore.config.http_engine import HttpEngineConfig
from equilibrium_mcore.config.rewards import RewardsConfig
from equilibrium_mcore.config.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
    setting,
)


class RolloutConfig(Section):
    """Answers of the policy, and how many updates learn from them.

    A rollout is made for training.global_batch_size * minibatches answers at a time.
    """

    samples_per_prompt: PositiveInt = setting(8, "answers to each prompt: a group")
    max_new_tokens: PositiveInt = setting(256, "longest answer; a longer one is cut off")
    temperature: PositiveFloat = setting(
        1.0, "divides the logits, of sampling and of training alike"
    )
    top_k: NonNegativeInt = setting(
        0, "a token is drawn from so many likeliest ids, in sampling and in training; 0: from all"
    )
    top_p: PositiveFraction = setting(
        1.0,
        "and of these from the fewest whose probabilities sum to this; 1: from all. What could be "
        "drawn is kept with each token, and probabilities of policy and reference are over it",
    )
    rows: PositiveInt = setting(64, "answers that a data rank continues at a time")
    minibatches: PositiveInt = setting(
        1,
        "parts of a rollout, of whole groups; each is an optimizer step over "
        "training.global_batch_size answers",
    )
    passes: PositiveInt = setting(1, "how often a rollout is trained on")
    resample: NonNegativeInt = setting(
        0,
        "how often groups whose answers are all worth the same are replaced by answers to further "
        "prompts (DAPO); 0: never",
    )
    shown: NonNegativeInt = setting(2, "answers of each rollout that samples.jsonl keeps")
    engine: Literal["own", "http"] = setting(
        "own", "who answers: the training modules (own), or a server that takes their weights"
    )
    http: HttpEngineConfig | None = setting(None, "the server, with engine: http")


class EvaluationConfig(Section):
    """Held-out prompts, judged by another parser than the rewards'."""

    interval_steps: NonNegativeInt = setting(0, "steps between evaluations; 0: never")
    prompts: PositiveInt | None = setting(None, "how many, the first ones; null: all")
    samples: NonNegativeInt = setting(
        0, "answers sampled for each prompt, for pass@k; the greedy one is beside them"
    )


def _with_name(values: Any) -> Any:
    return {"rewards": values} if isinstance(values, list) else values


RewardsChoice = Annotated[RewardsConfig, BeforeValidator(_with_name)]
"""A list of rewards alone, or with what is said beside it."""

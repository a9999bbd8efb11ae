"""Settings of what a policy learns from its own answers: advantage, ratio, reduction, by name.

A preset is a method by its paper's name; it is defaults for the settings of the same section.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import model_validator

from equilibrium_mcore.config.references import merge
from equilibrium_mcore.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
    setting,
)

PresetName = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "spo", "spo_minimind", "ppo", "opd"
]


class TrackerConfig(Section):
    """What a prompt is expected to earn, kept from step to step."""

    form: Literal["prompt", "single"] = setting(
        "prompt", "prompt: one expectation for each (arXiv 2509.13232); single: one for all"
    )
    low: float = setting(0.0, "the least reward")
    high: float = setting(1.0, "the largest reward")
    half_life: PositiveFloat = setting(
        0.06, "KL in nats per token by which the policy moves while half of the past is forgotten"
    )
    keep_least: Fraction = setting(0.875, "least share of the past that a visit keeps, below 1")
    keep_most: Fraction = setting(0.96, "largest share of the past that a visit keeps")
    prior: Fraction = setting(0.5, "expectation before the first visit, from 0 (low) to 1 (high)")

    @model_validator(mode="after")
    def _order(self) -> TrackerConfig:
        if self.high <= self.low:
            raise ValueError(f"high={self.high:g} must be above low={self.low:g}")
        if not self.keep_least <= self.keep_most or self.keep_least == 1:
            raise ValueError(
                f"keep_least={self.keep_least:g} must be below 1, and at most "
                f"keep_most={self.keep_most:g}"
            )
        return self


class KlConfig(Section):
    """The tie to the reference, which is the weights that the run starts from."""

    coefficient: NonNegativeFloat = setting(0.0, "in front of the divergence; 0: no reference")
    estimator: Literal["k1", "k2", "k3", "ratio_k3"] = setting(
        "k1", "of each token; k3 is biased in the loss (it is GRPO's), ratio_k3 is not"
    )
    place: Literal["reward", "loss"] = setting(
        "reward", "reward: a cost of the answer; loss: a term beside the policy's. One of them"
    )
    controller: Literal["fixed", "adaptive"] = setting(
        "fixed", "adaptive: the coefficient follows the measured divergence"
    )
    target: PositiveFloat = setting(0.1, "controller adaptive: divergence per token, in nats")
    horizon: PositiveInt = setting(10_000, "controller adaptive: its time scale, in answers")

    @model_validator(mode="after")
    def _place(self) -> KlConfig:
        if not self.coefficient and self.controller == "adaptive":
            raise ValueError("coefficient=0 with controller='adaptive': it multiplies, and stays 0")
        if self.coefficient and (self.place == "reward") != (self.estimator == "k1"):
            why = (
                "k1 in the loss has an expected gradient of 0: set place: reward, or estimator: "
                "ratio_k3"
                if self.estimator == "k1"
                else "its gradient as a cost is not the divergence's: set estimator: k1, or "
                "place: loss"
            )
            raise ValueError(f"estimator={self.estimator!r} with place={self.place!r}: {why}")
        return self


class MismatchConfig(Section):
    """The difference between the engine's log-probabilities and those of training."""

    correction: Literal["none", "truncate", "mask"] = setting(
        "truncate",
        "weight old / sampled of a token; truncate: at most `high`; mask: 0 outside of the bounds",
    )
    low: NonNegativeFloat = setting(0.5, "correction mask: the least weight")
    high: PositiveFloat = setting(2.0, "the largest weight")
    refuse_above_mean: PositiveFloat | None = setting(
        0.05, "the run stops if the mean size of log(old / sampled) is above; null: never"
    )

    @model_validator(mode="after")
    def _order(self) -> MismatchConfig:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self


class CriticConfig(Section):
    """The critic of advantage gae: a model of its own with a head of one value."""

    initial_weights: UserPath | None = setting(
        None, "a run's output directory, e.g. a reward model's; null: checkpoint.initial_weights"
    )
    learning_rate: PositiveFloat = setting(1e-5, "its optimizer's rate; the schedule is the run's")
    warmup_steps: NonNegativeInt = setting(
        0, "steps at the start in which the critic alone is trained"
    )
    value_clip: PositiveFloat | None = setting(
        0.2, "its loss lets a value move this far from that of before the step; null: freely"
    )
    gamma: Fraction = setting(1.0, "discount of a token")
    trace_decay: Fraction = setting(0.95, "lambda of generalised advantage estimation")


class PolicyConfig(Section):
    """A policy gradient on the model's own answers: advantage x ratio x reduction."""

    type: Literal["policy"] = setting("policy", "which objective")
    preset: PresetName = setting(
        "grpo", "a method by its paper's name: the defaults of the other settings here"
    )
    advantage: Literal["group", "leave_one_out", "batch", "tracker", "gae", "teacher"] = setting(
        "group",
        "what is taken off a reward: the mean of the answers to its prompt, of the others, of "
        "all, a tracker's expectation, a critic's values; teacher: log p of a teacher less the "
        "policy's, and no reward",
    )
    scale: Literal["none", "std", "batch"] = setting(
        "std", "what advantages are divided by: std: their prompt's deviation; batch: that of all"
    )
    advantage_bound: PositiveFloat | None = setting(None, "advantages are cut to this size")
    tracker: TrackerConfig = setting(TrackerConfig())
    ratio: Literal["token", "sequence", "none"] = setting(
        "token", "p / p before the step: of each token, their mean over an answer, or 1"
    )
    surrogate: Literal["clip", "cispo"] = setting(
        "clip", "clip: PPO's minimum; cispo: the bounded ratio is a weight of log p"
    )
    clip_low: Fraction = setting(0.2, "a ratio counts down to 1 - this")
    clip_high: PositiveFloat = setting(0.2, "a ratio counts up to 1 + this")
    reduction: Literal["token_mean", "sequence_mean", "constant_length"] = setting(
        "sequence_mean", "what is averaged over the batch: tokens, or answers"
    )
    constant_length: PositiveInt | None = setting(
        None, "reduction constant_length: tokens that an answer's sum is divided by"
    )
    truncated: Literal["score", "zero", "mask", "bootstrap"] = setting(
        "score",
        "answers that reached their length without an end: score: earn their score; zero: earn 0; "
        "mask: are not learnt from; bootstrap: earn what the critic expects of the rest",
    )
    teacher: UserPath | None = setting(
        None, "advantage teacher: its output directory, a model of the same vocabulary"
    )
    kl: KlConfig = setting(KlConfig(coefficient=0.04, estimator="k3", place="loss"))
    mismatch: MismatchConfig = setting(MismatchConfig())
    critic: CriticConfig | None = setting(None, "advantage gae: the critic; null: none")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        preset = PRESETS.get(values.get("preset", "grpo"))
        return values if preset is None else merge(preset, values)

    @model_validator(mode="after")
    def _fits(self) -> PolicyConfig:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether log p of a reference is asked for."""
        return self.kl.coefficient > 0


def _problems(config: PolicyConfig) -> Iterator[str]:
    if config.reduction == "constant_length" and config.constant_length is None:
        yield "reduction='constant_length' needs constant_length, e.g. the longest answer's tokens"
    if (config.advantage == "gae") != (config.critic is not None):
        said = "without a critic: set critic: {}" if config.critic is None else "with a critic: "
        yield f"advantage={config.advantage!r} {said}" + (
            "" if config.critic is None else "set critic: null, or advantage: gae"
        )
    if config.teacher is not None and config.advantage != "teacher":
        yield f"teacher={str(config.teacher)!r} with advantage={config.advantage!r}: leave it out"
    if config.advantage == "teacher" and config.kl.coefficient and config.kl.place == "reward":
        yield "advantage='teacher' has no reward that kl could be a cost of: set kl.place: loss"
    if config.truncated == "bootstrap" and config.advantage != "gae":
        yield "truncated='bootstrap' needs a critic's values: set advantage: gae, or another way"
    if config.scale == "std" and config.advantage not in ("group", "leave_one_out"):
        yield (
            f"scale='std' with advantage={config.advantage!r}: the deviation of a prompt's answers "
            "is for advantage group or leave_one_out; set scale to batch or none"
        )
    if config.surrogate == "clip" and config.clip_low == 1:
        yield "clip_low=1: must be below 1"
    if config.ratio == "sequence" and config.surrogate == "cispo":
        yield "ratio='sequence' with surrogate='cispo': set surrogate: clip, or ratio: token"


_NO_KL = {"coefficient": 0.0, "estimator": "k1", "place": "reward"}
_GRPO: dict[str, Any] = {  # arXiv 2402.03300
    "advantage": "group",
    "scale": "std",
    "ratio": "token",
    "surrogate": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "reduction": "sequence_mean",
    "kl": {"coefficient": 0.04, "estimator": "k3", "place": "loss"},
}
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": _GRPO,
    # arXiv 2503.20783. The length that it divides by is any constant; it scales the rate.
    "dr_grpo": {
        **_GRPO,
        "scale": "none",
        "reduction": "constant_length",
        "constant_length": 1024,
        "kl": _NO_KL,
    },
    # arXiv 2503.14476. Its length penalty is a reward: type: length with soft_from.
    "dapo": {**_GRPO, "clip_high": 0.28, "reduction": "token_mean", "kl": _NO_KL},
    "gspo": {  # arXiv 2507.18071
        **_GRPO,
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl": _NO_KL,
    },
    "cispo": {  # arXiv 2506.13585; the bound is that of 2510.13786, nothing bounds from below
        **_GRPO,
        "surrogate": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "reduction": "token_mean",
        "kl": _NO_KL,
    },
    "spo": {  # arXiv 2509.13232
        **_GRPO,
        "advantage": "tracker",
        "scale": "batch",
        "clip_high": 0.28,
        "reduction": "token_mean",
        "kl": _NO_KL,
    },
    "spo_minimind": {  # train_spo.py at 42a4e8c
        **_GRPO,
        "advantage": "tracker",
        "scale": "none",
        "advantage_bound": 5.0,
        "tracker": {"form": "single", "low": -3.0, "high": 3.0, "keep_least": 0.5},
        "ratio": "none",
        "surrogate": "cispo",
        "kl": {"coefficient": 0.02, "estimator": "k3", "place": "loss"},
    },
    "ppo": {  # arXiv 1707.06347, 2203.02155
        **_GRPO,
        "advantage": "gae",
        "scale": "batch",
        "reduction": "token_mean",
        "truncated": "bootstrap",
        "kl": {"coefficient": 0.02, "estimator": "k1", "place": "reward"},
        "critic": {},
    },
    # arXiv 2306.13649: the reverse KL to a teacher, by its gradient on the model's own answers.
    "opd": {
        **_GRPO,
        "advantage": "teacher",
        "scale": "none",
        "reduction": "token_mean",
        "kl": _NO_KL,
    },
}
"""Defaults of a section by the name of the method."""

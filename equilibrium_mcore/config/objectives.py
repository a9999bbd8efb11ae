"""What a run minimises: one section a kind, distinguished by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.config.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    SmallInt,
    UserPath,
    setting,
)


class NextTokenConfig(Section):
    """Cross-entropy of the next token, the mean over all counted tokens of the global batch."""

    type: Literal["next_token"] = setting("next_token", "which objective")


class SftConfig(Section):
    """Cross-entropy of the tokens that the model is to produce."""

    type: Literal["sft"] = setting("sft", "which objective")
    reduction: Literal["token_mean", "sequence_mean", "constant_length"] = setting(
        "token_mean", "what is averaged over the global batch: tokens, or examples"
    )
    constant_length: PositiveInt | None = setting(
        None, "reduction constant_length: tokens that an example's sum is divided by"
    )


class ReferencedConfig(Section):
    """An objective against what a reference thinks: the weights that the run starts from."""

    reference: Literal["live", "stored"] = setting(
        "live",
        "live: the run without its adapters, or a frozen copy of the weights; stored: what they "
        "think is computed once, before the first step, and kept in files",
    )
    reference_directory: UserPath | None = setting(
        None,
        "reference stored: the folder of the files, which runs of the same weights, data and "
        "packing may share; null: reference/ in the run's output_directory",
    )


class DpoConfig(ReferencedConfig):
    """Direct preference optimisation, against the weights that the run starts from."""

    type: Literal["dpo"] = setting("dpo", "which objective")
    beta: PositiveFloat = setting(0.1, "strength of the tie to the reference")
    label_smoothing: Fraction = setting(
        0.0, "share of the pairs that are taken for wrong, below 0.5"
    )


class IpoConfig(ReferencedConfig):
    """Identity preference optimisation: a regression of the margin to 1 / (2 beta)."""

    type: Literal["ipo"] = setting("ipo", "which objective")
    beta: PositiveFloat = setting(0.1, "strength of the tie to the reference")


class SimpoConfig(Section):
    """Simple preference optimisation: log p per token, and no reference."""

    type: Literal["simpo"] = setting("simpo", "which objective")
    beta: PositiveFloat = setting(2.0, "factor on the difference of log p per token")
    gamma: NonNegativeFloat = setting(1.0, "margin by which the chosen answer should be likelier")


class OrpoConfig(Section):
    """Odds-ratio preference optimisation: the chosen answer's likelihood, and no reference."""

    type: Literal["orpo"] = setting("orpo", "which objective")
    beta: PositiveFloat = setting(0.1, "weight of the odds ratio beside the likelihood")


class KtoConfig(ReferencedConfig):
    """KTO: answers by themselves, desirable or not, against the weights that the run starts from"""

    type: Literal["kto"] = setting("kto", "which objective")
    beta: PositiveFloat = setting(0.1, "strength of the tie to the reference")
    desirable_weight: PositiveFloat = setting(1.0, "factor on the loss of desirable answers")
    undesirable_weight: PositiveFloat = setting(1.0, "factor on the loss of undesirable answers")


class RewardModelConfig(Section):
    """Bradley-Terry: the chosen answer of a pair should have the larger score."""

    type: Literal["reward_model"] = setting("reward_model", "which objective")
    centring: NonNegativeFloat = setting(
        0.0, "factor on the square of both scores' sum, which keeps scores near 0"
    )


class DistillationConfig(Section):
    """Cross-entropy, and the divergence from a teacher's distribution, of the tokens that count."""

    type: Literal["distillation"] = setting("distillation", "which objective")
    teacher: UserPath | None = setting(
        None, "a run's output directory, or one of its checkpoints, of the same tokenizer"
    )
    targets: UserPath | None = setting(
        None,
        "a folder of the teacher's likeliest tokens, made once by tools/store_targets.py: the run "
        "then reads them and loads no teacher",
    )
    top_k: SmallInt = setting(64, "targets: likeliest tokens of each position; the rest is one bin")
    cross_entropy_weight: Fraction = setting(
        0.5, "share of the cross-entropy, below 1; the divergence times temperature^2 has the rest"
    )
    temperature: PositiveFloat = setting(
        1.0, "what both models' logits are divided by in the divergence"
    )
    direction: Literal["forward", "reverse"] = setting(
        "forward",
        "forward: the student covers what the teacher says; reverse: it says nothing that the "
        "teacher would not",
    )


PREFERENCES = (DpoConfig, IpoConfig, SimpoConfig, OrpoConfig, RewardModelConfig)
"""Those that need pairs."""
ON_OWN_ANSWERS = (DpoConfig, IpoConfig, SimpoConfig)
"""Those of pairs that a judge may make of a policy's own answers."""
REFERENCED = (DpoConfig, IpoConfig, KtoConfig)
"""Those that need the log-probabilities of a reference."""
SCORED = (RewardModelConfig,)
"""Those of the values that a scalar head gives."""

ObjectiveConfig = Annotated[
    NextTokenConfig
    | SftConfig
    | DpoConfig
    | IpoConfig
    | SimpoConfig
    | OrpoConfig
    | KtoConfig
    | RewardModelConfig
    | DistillationConfig
    | PolicyConfig,
    Field(discriminator="type"),
]

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


class DpoConfig(Section):
    """Direct preference optimisation, against the weights that the run starts from."""

    type: Literal["dpo"] = setting("dpo", "which objective")
    beta: PositiveFloat = setting(0.1, "strength of the tie to the reference")
    label_smoothing: Fraction = setting(
        0.0, "share of the pairs that are taken for wrong, below 0.5"
    )


class IpoConfig(Section):
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


PREFERENCES = (DpoConfig, IpoConfig, SimpoConfig, OrpoConfig)
"""Those that need pairs."""
REFERENCED = (DpoConfig, IpoConfig)
"""Those that need the log-probabilities of a reference."""

ObjectiveConfig = Annotated[
    NextTokenConfig | SftConfig | DpoConfig | IpoConfig | SimpoConfig | OrpoConfig | PolicyConfig,
    Field(discriminator="type"),
]

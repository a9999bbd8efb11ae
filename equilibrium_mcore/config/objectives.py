"""What a run minimises: one section a kind, distinguished by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from equilibrium_mcore.config.section import PositiveInt, Section, setting


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


ObjectiveConfig = Annotated[NextTokenConfig | SftConfig, Field(discriminator="type")]

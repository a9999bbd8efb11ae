"""What a model has at its end, by `model.head`."""

from __future__ import annotations

from equilibrium_mcore.config.schema import ModelConfig


def has_output(model: ModelConfig) -> bool:
    """Whether it predicts tokens."""
    return model.head != "scalar"


def has_scalar_head(model: ModelConfig) -> bool:
    """Whether it gives a number per token."""
    return model.head != "output"

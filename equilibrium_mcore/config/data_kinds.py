"""What a run can be trained on: one section a kind, distinguished by `type`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from equilibrium_mcore.config.chat import ConversationsConfig, PreferencesConfig, PromptsConfig
from equilibrium_mcore.config.data import DataConfig


def _with_type(values: object) -> object:
    """A section that names no kind is a blend of indexed datasets."""
    return {"type": "indexed", **values} if isinstance(values, dict) else values


DataChoice = Annotated[
    Annotated[
        DataConfig | ConversationsConfig | PreferencesConfig | PromptsConfig,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_type),
]

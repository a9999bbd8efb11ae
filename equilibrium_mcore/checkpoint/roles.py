"""Models that a run trains beside its own, in the same checkpoints: each under its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint
from equilibrium_mcore.checkpoint.optimizer_state import (
    load_optimizer_state,
    sharded_optimizer_state,
)
from equilibrium_mcore.checkpoint.safe_load import ROLES_PREFIX, allowed_classes_only
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.optim.optimizer import HybridOptimizer


class Role(NamedTuple):
    """A model that trains, on one rank."""

    chunks: list[torch.nn.Module]
    optimizer: HybridOptimizer


def sharded_roles(roles: Mapping[str, Role]) -> dict[str, Any]:
    """Weights and optimizer states of the roles, by name, as global tensors."""
    return {name: _sharded(name, role) for name, role in roles.items()}


def load_role(opened: OpenedCheckpoint, name: str, role: Role) -> None:
    """Take back what a checkpoint holds of the role, saved in any layout. Collective.

    Raises ConfigError for a checkpoint without it.
    """
    if name not in opened.facts.get("roles", []):
        raise ConfigError(
            f"{opened.path} has no {name}: it was saved by a run without one; start a new run from "
            "its weights (checkpoint.initial_weights) in another output_directory"
        )
    wanted = {"roles": {name: _sharded(name, role)}}
    with allowed_classes_only():
        state = dist_checkpointing.load(wanted, str(opened.path))["roles"][name]
    for key, chunk in _named(role.chunks):
        chunk.load_state_dict(state[key])
    load_optimizer_state(role.optimizer, state["optimizer"])


def _sharded(name: str, role: Role) -> dict[str, Any]:
    state = {key: chunk.sharded_state_dict() for key, chunk in _named(role.chunks)}
    state["optimizer"] = sharded_optimizer_state(role.optimizer, dict(state))
    add_prefix_for_sharding(state, f"{ROLES_PREFIX}{name}.")
    return state


def _named(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    return [(f"model{i}", getattr(chunk, "module", chunk)) for i, chunk in enumerate(chunks)]

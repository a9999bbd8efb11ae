"""A run's state as global tensors, and loading it, over megatron-core's distributed checkpointing.

The state of the model, the optimizer and the random generators is saved as global tensors, so a
checkpoint of any layout loads in any other.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection

from equilibrium_mcore.adapters.merge import adapters_of_weights
from equilibrium_mcore.checkpoint import structure
from equilibrium_mcore.checkpoint.choose import open_weights_together
from equilibrium_mcore.checkpoint.compatibility import check_same_model
from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint
from equilibrium_mcore.checkpoint.optimizer_state import (
    load_optimizer_state,
    sharded_optimizer_state,
)
from equilibrium_mcore.checkpoint.safe_load import allowed_classes_only
from equilibrium_mcore.checkpoint.vocabulary import fill_new_rows
from equilibrium_mcore.config.heads import has_scalar_head
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.models.heads import SCALAR_HEAD
from equilibrium_mcore.optim.frozen import check_optimizer_state
from equilibrium_mcore.optim.optimizer import HybridOptimizer
from equilibrium_mcore.parallel.random_states import random_states, set_random_states


def load_checkpoint(
    opened: OpenedCheckpoint,
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    groups: ProcessGroupCollection,
) -> dict[str, Any]:
    """Load everything from a checkpoint into the run; returns its progress. Collective.

    `check_resumable` was asked before. Raises ConfigError where optimizer state that the run needs
    was not saved.
    """
    path, facts = opened.path, opened.facts
    check_optimizer_state(opened.config, config, checkpoint=str(path))
    same_layout = _layout_facts(facts) == _layout_facts(
        {
            "layout": config.parallelism.model_dump(mode="json"),
            "world_size": torch.distributed.get_world_size(),
        }
    )
    wanted = sharded_state(chunks, optimizer, None)
    if not same_layout:
        # Random states belong to the ranks of one layout; another layout has its own seeds.
        del wanted[structure.RNG_KEY]
    with allowed_classes_only():
        state = dist_checkpointing.load(wanted, str(path))
    for name, chunk in _named_chunks(chunks):
        chunk.load_state_dict(state[name])
    load_optimizer_state(optimizer, state["optimizer"])
    if same_layout:
        set_random_states(state[structure.RNG_KEY])
    return state["progress"]


def load_weights(
    weights: OpenedCheckpoint | Path,
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    groups: ProcessGroupCollection,
    optimizer: HybridOptimizer | None = None,
    fold: bool = True,
) -> None:
    """Load the model's weights alone, and make an optimizer take them as its main weights.

    Adapters among the weights are added to what they stand beside, and the run's own are kept. Not
    to `fold` takes them for the run's own, which must be of the same settings.

    Tokens that the weights have no rows for start with the mean of the others' rows. A scalar head
    that they do not have stays as it was drawn.

    `weights` is an opened checkpoint, or a run's output directory or checkpoint, which is opened
    and verified first. Collective. Raises ConfigError, and DamagedCheckpointError.
    """
    if not isinstance(weights, OpenedCheckpoint):
        weights = open_weights_together(weights, verify=config.checkpoint.verify)
    check_same_model(weights.config, config, checkpoint=str(weights.path))
    bare = [chunk for _, chunk in _named_chunks(chunks)]
    folded = adapters_of_weights(bare, weights.config, groups=groups)
    with folded if fold else contextlib.nullcontext():
        wanted = {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(chunks)}
        new: dict[str, dict[str, Any]] = {}
        if not has_scalar_head(weights.config.model):
            new = {name: _without_head(wanted[name], chunk) for name, chunk in _named_chunks(bare)}
        with allowed_classes_only():
            state = dist_checkpointing.load(wanted, str(weights.path))
        for name, chunk in _named_chunks(chunks):
            chunk.load_state_dict({**state[name], **new.get(name, {})})
    fill_new_rows(chunks, saved=weights.config.model, wanted=config.model, groups=groups)
    if optimizer is not None:
        optimizer.refresh_main_weights()


def _without_head(wanted: dict[str, Any], chunk: torch.nn.Module) -> dict[str, Any]:
    """Take the scalar head out of what is to be loaded; the chunk's own, by name."""
    names = [name for name in wanted if name.startswith(f"{SCALAR_HEAD}.")]
    for name in names:
        del wanted[name]
    return {name: value for name, value in chunk.state_dict().items() if name in names}


def _layout_facts(facts: dict) -> str:
    layout = {key: value for key, value in facts["layout"].items() if key != "world_size"}
    return json.dumps([layout, facts["world_size"]], sort_keys=True)


def _named_chunks(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Chunks by a name that stays in this process; the checkpoint's keys do not hold it."""
    return [(f"model{index}", _unwrap(chunk)) for index, chunk in enumerate(chunks)]


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    return getattr(chunk, "module", chunk)


def sharded_state(
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    progress: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that a checkpoint holds, as megatron-core's sharded tensors and objects."""
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict() for name, chunk in _named_chunks(chunks)
    }
    state["optimizer"] = sharded_optimizer_state(
        optimizer, {name: state[name] for name, _ in _named_chunks(chunks)}
    )
    if progress is not None:
        state["progress"] = progress
    state[structure.RNG_KEY] = ShardedObject(
        structure.RNG_KEY,
        random_states(),
        global_shape=(torch.distributed.get_world_size(),),
        global_offset=(torch.distributed.get_rank(),),
        replica_id=0,
    )
    return state

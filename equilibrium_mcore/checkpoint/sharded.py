"""Saving and loading the sharded state, over megatron-core's distributed checkpointing.

The state of the model, the optimizer and the random generators is saved as global tensors, so a
checkpoint of any layout loads in any other.
"""

from __future__ import annotations

import json
import queue
import random
from pathlib import Path
from typing import Any

import megatron.core
import numpy
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

import equilibrium_mcore
from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.checkpoint.compatibility import check_resumable, check_same_model
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run, save_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.optim.optimizer import HybridOptimizer

RNG_KEY = "random_states"


def save_checkpoint(
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    groups: ProcessGroupCollection,
    progress: dict[str, Any],
) -> Path:
    """Save the run after `progress["step"]` steps; returns the checkpoint's folder. Collective.

    The folder gets its final name, and `latest` points at it, only after every rank has written.
    """
    final = directory.checkpoint_path(config.output_directory, progress["step"])
    aside = directory.partial_path(final)
    if torch.distributed.get_rank() == 0:
        directory.remove_partial(config.output_directory)
        aside.mkdir(parents=True)
    torch.distributed.barrier()
    # A save that does not return before it is written needs no process to collect results in.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    with optimizer.evaluation_weights():
        dist_checkpointing.save(_sharded_state(chunks, optimizer, groups, progress), str(aside))
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        save_config(config, aside / directory.CONFIG_FILE)
        directory.write_state(
            aside,
            {
                **progress,
                "layout": config.parallelism.model_dump(mode="json"),
                "world_size": torch.distributed.get_world_size(),
                "versions": {
                    "torch": torch.__version__,
                    "megatron-core": megatron.core.__version__,
                    "equilibrium_mcore": equilibrium_mcore.__version__,
                },
            },
        )
        directory.publish(final, keep_last=config.checkpoint.keep_last)
    torch.distributed.barrier()
    return final


def load_checkpoint(
    path: Path,
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    groups: ProcessGroupCollection,
) -> dict[str, Any]:
    """Load everything from `path` into the run; returns its progress. Collective.

    Raises ConfigError where a setting that the state depends on differs.
    """
    check_resumable(_saved_config(path), config, checkpoint=str(path))
    facts = directory.read_state(path)
    same_layout = _layout_facts(facts) == _layout_facts(
        {
            "layout": config.parallelism.model_dump(mode="json"),
            "world_size": torch.distributed.get_world_size(),
        }
    )
    wanted = _sharded_state(chunks, optimizer, groups, None)
    if not same_layout:
        # Random states belong to the ranks of one layout; a new layout goes on with its own seeds.
        del wanted[RNG_KEY]
    state = dist_checkpointing.load(wanted, str(path))
    for name, chunk in _named_chunks(chunks):
        chunk.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    if same_layout:
        _set_random_states(state[RNG_KEY])
    return state["progress"]


def load_weights(
    path: Path,
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer | None,
) -> None:
    """Load the model's weights alone, and make the optimizer take them as its main weights."""
    folder = directory.latest_checkpoint(path)
    if folder is None:
        raise ConfigError(
            [
                f"checkpoint.initial_weights={path}: there is no checkpoint. Name a run's output "
                "directory, or one of its checkpoints/step_... folders"
            ]
        )
    check_same_model(_saved_config(folder), config, checkpoint=str(folder))
    wanted = {name: _unwrap(chunk).sharded_state_dict() for name, chunk in _named_chunks(chunks)}
    state = dist_checkpointing.load(wanted, str(folder))
    for name, chunk in _named_chunks(chunks):
        chunk.load_state_dict(state[name])
    if optimizer is not None:
        optimizer.refresh_main_weights()


def _saved_config(folder: Path) -> RunConfig:
    return load_run(folder / directory.CONFIG_FILE)


def _layout_facts(facts: dict) -> str:
    layout = {key: value for key, value in facts["layout"].items() if key != "world_size"}
    return json.dumps([layout, facts["world_size"]], sort_keys=True)


def _named_chunks(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Chunks by a name that stays in this process; the checkpoint's keys do not hold it."""
    return [(f"model{index}", _unwrap(chunk)) for index, chunk in enumerate(chunks)]


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    return getattr(chunk, "module", chunk)


def _sharded_state(
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    groups: ProcessGroupCollection,
    progress: dict[str, Any] | None,
) -> dict[str, Any]:
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict() for name, chunk in _named_chunks(chunks)
    }
    state["optimizer"] = optimizer.sharded_state_dict(
        {name: state[name] for name, _ in _named_chunks(chunks)}
    )
    if progress is not None:
        state["progress"] = progress
    state[RNG_KEY] = ShardedObject(
        RNG_KEY,
        _random_states(),
        global_shape=(torch.distributed.get_world_size(),),
        global_offset=(torch.distributed.get_rank(),),
        replica_id=0,
    )
    return state


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "trackers": get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["trackers"])

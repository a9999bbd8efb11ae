"""Saving and loading the sharded state, over megatron-core's distributed checkpointing.

The state of the model, the optimizer and the random generators is saved as global tensors, so a
checkpoint of any layout loads in any other.
"""

from __future__ import annotations

import json
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.process_groups_config import ProcessGroupCollection

import equilibrium_mcore
from equilibrium_mcore.checkpoint import directory, publish, structure
from equilibrium_mcore.checkpoint.choose import open_weights_together
from equilibrium_mcore.checkpoint.compatibility import check_same_model
from equilibrium_mcore.checkpoint.finite import check_finite
from equilibrium_mcore.checkpoint.lineage import Lineage
from equilibrium_mcore.checkpoint.manifest import Files, describe_file, write_manifest
from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint
from equilibrium_mcore.checkpoint.optimizer_state import (
    load_optimizer_state,
    sharded_optimizer_state,
)
from equilibrium_mcore.checkpoint.safe_load import allowed_classes_only
from equilibrium_mcore.checkpoint.together import on_every_rank, on_first_rank
from equilibrium_mcore.checkpoint.vocabulary import fill_new_rows
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.whole import sync_directory, sync_file
from equilibrium_mcore.optim.frozen import check_optimizer_state
from equilibrium_mcore.optim.optimizer import HybridOptimizer
from equilibrium_mcore.parallel.random_states import random_states, set_random_states


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is in place."""

    path: Path
    renamed: str | None  # what a folder is called now that had the name before


def save_checkpoint(
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    groups: ProcessGroupCollection,
    progress: dict[str, Any],
    line: Lineage | None = None,
) -> SavedCheckpoint:
    """Save the run after `progress["step"]` steps. Collective.

    The folder gets its final name, and `latest` points at it, only after every rank has written,
    hashed its files and brought them to the disk. Only checkpoints on `line` are ever removed; None
    is that of a new run. Raises FloatingPointError, and writes nothing, where the state is not
    finite.
    """
    final = directory.checkpoint_path(config.output_directory, progress["step"])
    line = on_first_rank(lambda: line or Lineage.new())
    with optimizer.evaluation_weights():
        sharded = _sharded_state(chunks, optimizer, groups, progress)
        check_finite(chunks, optimizer, step=progress["step"], kept=lambda: _kept(config))
        on_first_rank(lambda: _start(config, final, line))
        content = publish.partial_content(final, line)
        # A save that does not return before it is written needs no process to collect results in.
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(sharded, str(content))
        torch.distributed.barrier()
    written: Files = {}
    for files in on_every_rank(lambda: _seal(content, config, progress, line)):
        written |= files
    return on_first_rank(lambda: _publish(config, final, line, written))


def _kept(config: RunConfig) -> str:
    latest = directory.latest_checkpoint(config.output_directory)
    return "There is none before." if latest is None else f"{latest} stays the latest."


def _start(config: RunConfig, final: Path, line: Lineage) -> None:
    publish.remove_partial(config.output_directory, line)
    publish.start_partial(final, line)


def _seal(content: Path, config: RunConfig, progress: dict[str, Any], line: Lineage) -> Files:
    """Hash what this rank wrote and bring it to the disk; rank 0 adds the files of all."""
    rank = torch.distributed.get_rank()
    names = [path.name for path in content.glob(f"__{rank}_*")]
    if rank == 0:
        save_config(config, content / directory.CONFIG_FILE)
        directory.write_state(content, _facts(config, progress, line))
        names += sorted({*structure.PLAIN, directory.STATE_FILE})
    for name in names:
        sync_file(content / name)
    return {name: describe_file(content / name) for name in names}


def _facts(config: RunConfig, progress: dict[str, Any], line: Lineage) -> dict[str, Any]:
    return {
        **progress,
        "run": line.facts(),
        "layout": config.parallelism.model_dump(mode="json"),
        "world_size": torch.distributed.get_world_size(),
        "versions": {
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "equilibrium_mcore": equilibrium_mcore.__version__,
        },
    }


def _publish(config: RunConfig, final: Path, line: Lineage, files: Files) -> SavedCheckpoint:
    content = publish.partial_content(final, line)
    if unclaimed := {path.name for path in content.glob("*.distcp")} - files.keys():
        raise OSError(f"{content}: no rank has written {', '.join(sorted(unclaimed))}")
    write_manifest(content, files)
    sync_directory(content)
    renamed = publish.publish(final, line, keep_last=config.checkpoint.keep_last)
    return SavedCheckpoint(final, renamed)


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
    wanted = _sharded_state(chunks, optimizer, groups, None)
    if not same_layout:
        # Random states belong to the ranks of one layout; a new layout goes on with its own seeds.
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
) -> None:
    """Load the model's weights alone, and make an optimizer take them as its main weights.

    Tokens that the weights have no rows for start with the mean of the others' rows.

    `weights` is an opened checkpoint, or a run's output directory or checkpoint, which is opened
    and verified first. Collective. Raises ConfigError, and DamagedCheckpointError.
    """
    if not isinstance(weights, OpenedCheckpoint):
        weights = open_weights_together(weights, verify=config.checkpoint.verify)
    check_same_model(weights.config, config, checkpoint=str(weights.path))
    wanted = {name: _unwrap(chunk).sharded_state_dict() for name, chunk in _named_chunks(chunks)}
    with allowed_classes_only():
        state = dist_checkpointing.load(wanted, str(weights.path))
    for name, chunk in _named_chunks(chunks):
        chunk.load_state_dict(state[name])
    fill_new_rows(chunks, saved=weights.config.model, wanted=config.model, groups=groups)
    if optimizer is not None:
        optimizer.refresh_main_weights()


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

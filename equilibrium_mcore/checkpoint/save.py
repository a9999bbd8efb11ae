"""Saving a run: a plan that all ranks share, data files that each writes, one name at the end.

`begin_save` returns when the state is copied or written, `finish_save` when the checkpoint has its
name. Between the two a run may train, if its writer works beside it; no collective runs meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import WriteItemType

import equilibrium_mcore
from equilibrium_mcore.checkpoint import directory, publish, structure
from equilibrium_mcore.checkpoint.background import InPlace, Writer
from equilibrium_mcore.checkpoint.data_files import DataFile
from equilibrium_mcore.checkpoint.finite import check_finite
from equilibrium_mcore.checkpoint.lineage import Lineage
from equilibrium_mcore.checkpoint.manifest import Files, describe_file, write_manifest
from equilibrium_mcore.checkpoint.roles import Role, sharded_roles
from equilibrium_mcore.checkpoint.sharded import sharded_state
from equilibrium_mcore.checkpoint.shared_buffer import ALIGNMENT
from equilibrium_mcore.checkpoint.together import on_every_rank, on_first_rank
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.files.whole import sync_directory, sync_file
from equilibrium_mcore.optim.optimizer import HybridOptimizer


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is in place."""

    path: Path
    renamed: str | None  # what a folder is called now that had the name before
    progress: dict[str, Any]  # what it holds of the run's progress


@dataclass(frozen=True)
class SaveInProgress:
    """A checkpoint whose data files are being written; `finish_save` gives it its name."""

    config: RunConfig
    path: Path
    progress: dict[str, Any]
    line: Lineage
    writer: Writer
    roles: tuple[str, ...]
    finalize: Sequence[Callable[[], None]]  # megatron-core's: the metadata of all ranks' files


def save_checkpoint(
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    progress: dict[str, Any],
    line: Lineage | None = None,
) -> SavedCheckpoint:
    """Save the run after `progress["step"]` steps, and wait until it is in place. Collective.

    See `begin_save` and `finish_save`.
    """
    return finish_save(
        begin_save(
            config=config,
            chunks=chunks,
            optimizer=optimizer,
            progress=progress,
            line=line,
            writer=InPlace(),
        )
    )


def begin_save(
    *,
    config: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: HybridOptimizer,
    progress: dict[str, Any],
    line: Lineage | None = None,
    writer: Writer,
    roles: Mapping[str, Role] | None = None,
) -> SaveInProgress:
    """Hand this rank's part of the run's state to `writer`. Collective.

    The run may change its weights once this returns. Nothing that is called a checkpoint is there
    yet. Only checkpoints on `line` are ever removed; None is that of a new run. `roles` are models
    that train beside the run's own. Raises FloatingPointError, and writes nothing, where the state
    is not finite.
    """
    roles = roles or {}
    final = directory.checkpoint_path(config.output_directory, progress["step"])
    line = on_first_rank(lambda: line or Lineage.new())
    with optimizer.evaluation_weights():
        sharded = sharded_state(chunks, optimizer, progress)
        if roles:
            sharded["roles"] = sharded_roles(roles)
        for part in (Role(chunks, optimizer), *roles.values()):
            check_finite(*part, step=progress["step"], kept=lambda: _kept(config))
        on_first_rank(lambda: _start(config, final, line))
        request = _planned(sharded, publish.partial_content(final, line))
        writer.take(_data_files(request))
    return SaveInProgress(config, final, progress, line, writer, tuple(roles), request.finalize_fns)


def finish_save(save: SaveInProgress) -> SavedCheckpoint:
    """Wait for the data files, and give the checkpoint its name. Collective.

    The folder gets its final name, and `latest` points at it, only after every rank has written and
    hashed its files and brought them to the disk. Raises on every rank what the writing raised on
    one.
    """
    written: Files = {}
    for files in on_every_rank(lambda: _written(save)):
        written |= files
    for finalize in save.finalize:
        with naming(publish.partial_content(save.path, save.line)):
            finalize()
    written |= on_first_rank(lambda: _seal(save))
    return on_first_rank(lambda: _publish(save, written))


def bytes_of_state(optimizer: HybridOptimizer) -> int:
    """About how much this rank saves: weights and state of the parameters that it owns."""
    optimizer.init_state()
    tensors = (
        tensor
        for parameter in optimizer.parameters
        if parameter.is_owned
        for tensor in (
            parameter.model,
            *optimizer.state_of(parameter).values(),
            *optimizer.whole_state_of(parameter).values(),
        )
    )
    return sum(tensor.nbytes + ALIGNMENT for tensor in tensors)


def abandon_save(save: SaveInProgress) -> None:
    """Wait for the data files, and remove them: the state that they hold is not wanted. Collective.

    What the writing raised does not matter any more.
    """
    with contextlib.suppress(OSError):
        on_every_rank(save.writer.result)
    on_first_rank(lambda: publish.abandon_partial(save.path, save.line))


def _planned(sharded: dict[str, Any], content: Path) -> AsyncRequest:
    """megatron-core's plan of a save: who writes what into which file. Collective."""
    filesystem_async._results_queue = queue.Queue()  # else it starts a process for its results
    torch_strategy._logged_mcore_async_deprecation = True  # its plan is used, not its processes
    with _nothing_copied(), naming(content):
        return dist_checkpointing.save(
            sharded, str(content), async_sharded_save=True, async_strategy="mcore"
        )


@contextmanager
def _nothing_copied() -> Iterator[None]:
    """Inside, megatron-core's plan holds the tensors themselves, where it would clone views."""

    def prepare(writer, plan, planner) -> None:
        found = [(item, planner.resolve_data(item)) for item in plan.items]
        objects = [pair for pair in found if pair[0].type == WriteItemType.BYTE_IO]
        tensors = [pair for pair in found if pair[0].type != WriteItemType.BYTE_IO]
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        path = os.path.join(writer.checkpoint_dir, name)
        writer.write_buckets = [(path, name, (objects, tensors))] if found else []
        writer.results_queue = filesystem_async._results_queue if found else None

    before = FileSystemWriterAsync.prepare_write_data
    FileSystemWriterAsync.prepare_write_data = prepare
    try:
        yield
    finally:
        FileSystemWriterAsync.prepare_write_data = before


def _data_files(request: AsyncRequest) -> list[DataFile]:
    """This rank's files, with the tensors where they are."""
    if not request.async_fn_args:
        return []
    _, buckets, _ = request.async_fn_args
    return [
        DataFile(Path(path), name, [(item, data.getvalue()) for item, data in objects], tensors)
        for path, name, (objects, tensors) in buckets
    ]


def _written(save: SaveInProgress) -> Files:
    """This rank's files; where their items lie is told to megatron-core, as its writer would."""
    written = save.writer.result()
    results = {number: file.results for number, file in enumerate(written)}
    filesystem_async._results_queue.put(results)
    return {file.name: file.facts for file in written}


def _kept(config: RunConfig) -> str:
    latest = directory.latest_checkpoint(config.output_directory)
    return "There is none before." if latest is None else f"{latest} stays the latest."


def _start(config: RunConfig, final: Path, line: Lineage) -> None:
    publish.remove_partial(config.output_directory, line)
    publish.start_partial(final, line)


def _seal(save: SaveInProgress) -> Files:
    """Write the files that are not data, bring them to the disk and hash them. One rank."""
    content = publish.partial_content(save.path, save.line)
    save_config(save.config, content / directory.CONFIG_FILE)
    directory.write_state(content, _facts(save))
    names = sorted({*structure.PLAIN, directory.STATE_FILE})
    for name in names:
        sync_file(content / name)
    return {name: describe_file(content / name) for name in names}


def _facts(save: SaveInProgress) -> dict[str, Any]:
    return {
        **save.progress,
        "run": save.line.facts(),
        **({"roles": list(save.roles)} if save.roles else {}),
        "layout": save.config.parallelism.model_dump(mode="json"),
        "world_size": torch.distributed.get_world_size(),
        "versions": {
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "equilibrium_mcore": equilibrium_mcore.__version__,
        },
    }


def _publish(save: SaveInProgress, files: Files) -> SavedCheckpoint:
    content = publish.partial_content(save.path, save.line)
    if unclaimed := {path.name for path in content.glob("*.distcp")} - files.keys():
        raise OSError(f"{content}: no rank has written {', '.join(sorted(unclaimed))}")
    write_manifest(content, files)
    sync_directory(content)
    renamed = publish.publish(save.path, save.line)
    settings = save.config.checkpoint
    for old in publish.drop_oldest(
        save.config.output_directory, save.line, keep_last=settings.keep_last
    ):
        save.writer.remove(old)
    return SavedCheckpoint(save.path, renamed, save.progress)

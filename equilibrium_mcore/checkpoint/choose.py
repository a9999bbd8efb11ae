"""Which checkpoint a run continues: chosen once, before anything is built, for all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.checkpoint.compatibility import grown_vocabulary, noted_changes
from equilibrium_mcore.checkpoint.lineage import Lineage
from equilibrium_mcore.checkpoint.manifest import (
    Damage,
    DamagedCheckpointError,
    shares,
    wrong_hashes,
)
from equilibrium_mcore.checkpoint.opened import (
    OpenedCheckpoint,
    inspect,
    open_checkpoint,
    with_way_out,
)
from equilibrium_mcore.checkpoint.publish import left_alone
from equilibrium_mcore.checkpoint.together import on_every_rank, on_first_rank
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig

Note = tuple[str, dict[str, Any]]  # an event of metrics.jsonl: its name, its details

INITIAL_WEIGHTS = "checkpoint.initial_weights"  # the setting that names weights to start from


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from, the same on every rank."""

    checkpoint: OpenedCheckpoint | None = None  # to resume
    weights: OpenedCheckpoint | None = None  # to start from, where nothing is resumed
    line: Lineage = field(default_factory=Lineage.new)  # of the run that begins
    notes: tuple[Note, ...] = ()  # what has to be said of the choice

    @property
    def progress(self) -> dict[str, Any] | None:
        """`state.json` of the checkpoint that is resumed: step, samples, ledger."""
        return None if self.checkpoint is None else self.checkpoint.facts


def choose(config: RunConfig) -> StartingPoint:
    """The newest checkpoint that verifies, of those that the config wants. Collective.

    Raises ConfigError where one must be resumed and none is there, and DamagedCheckpointError
    where none that is there, or none that was asked for, can be used.
    """
    order, notes = on_first_rank(lambda: _order(config))
    verify = config.checkpoint.verify
    found = _first_whole(
        config, order, lambda path: open_together(path, needs_state=True, verify=verify)
    )
    if found is None:
        return _from_scratch(config, notes)
    notes += [_damage_note(error) for error in found.damaged]
    return _chosen(config, found.opened, notes + _verified(found.opened, config, found.start))


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest whole checkpoint, what was newer and damaged, and when its opening began."""

    opened: OpenedCheckpoint
    damaged: list[DamagedCheckpointError]
    start: float


def find_alone(config: RunConfig, *, verify: bool, workers: int = 1) -> FoundCheckpoint | None:
    """What `choose` would find to resume, by this process alone; None for nothing.

    Without `verify` the data is not hashed: names, sizes, the small files and the structure are
    checked all the same. Raises as `choose` does.
    """

    def open_one(path: Path) -> OpenedCheckpoint:
        if not verify:
            return inspect(path, needs_state=True)
        return open_checkpoint(path, needs_state=True, workers=workers)

    return _first_whole(config, _order(config)[0], open_one)


def _first_whole(
    config: RunConfig, order: list[Path], open_one: Callable[[Path], OpenedCheckpoint]
) -> FoundCheckpoint | None:
    broken: list[DamagedCheckpointError] = []
    for path in order:
        start = time.perf_counter()
        try:
            return FoundCheckpoint(open_one(path), broken, start)
        except DamagedCheckpointError as error:
            broken.append(error)
    if broken:
        raise _none_left(config, broken)
    return None


def _order(config: RunConfig) -> tuple[list[Path], list[Note]]:
    """The checkpoints to try, and what is to be said of how they were found."""
    settings, folder = config.checkpoint, config.output_directory
    if settings.resume == "never":
        return [], []
    order, wrong = directory.resume_order(folder)
    if settings.resume_step is not None:
        order, wrong = [directory.checkpoint_path(folder, settings.resume_step)], None
        if not order[0].is_dir():
            others = ", ".join(p.name for p in directory.list_checkpoints(folder)) or "none"
            raise ConfigError(
                f"checkpoint.resume_step={settings.resume_step}, but {order[0]} is not there: "
                f"name the step of one that is ({others}), or null"
            )
    elif wrong is not None and not order and directory.list_checkpoints(folder):
        others = ", ".join(path.name for path in directory.list_checkpoints(folder))
        raise ConfigError(
            f"{directory.checkpoints_directory(folder)}/latest {wrong}, and nothing before it is "
            f"there: write the name of one that is ({others}) into it, or set "
            "checkpoint.resume=never to start from scratch"
        )
    elif settings.resume == "must" and not order:
        raise ConfigError(
            f"checkpoint.resume=must, but {folder} holds no checkpoint: name the "
            "output_directory of the run to resume, or use checkpoint.resume=auto"
        )
    pointer = directory.checkpoints_directory(folder) / directory.LATEST
    return order, [
        ("latest_lost", {"file": str(pointer), "what": wrong})
    ] if wrong and order else []


def open_together(path: Path, *, needs_state: bool, verify: bool) -> OpenedCheckpoint:
    """The checkpoint, its data hashed by all ranks, each a share. Collective."""
    opened = on_first_rank(lambda: inspect(path, needs_state=needs_state, verify=verify))
    if verify and opened.files is not None:
        lists = shares(opened.data_files, torch.distributed.get_world_size())
        mine = lists[torch.distributed.get_rank()]
        found = on_every_rank(lambda: wrong_hashes(path, opened.files, mine))
        if damages := [damage for some in found for damage in some]:
            raise DamagedCheckpointError(path, damages)
    return opened


def _chosen(config: RunConfig, opened: OpenedCheckpoint, notes: list[Note]) -> StartingPoint:
    line = on_first_rank(lambda: Lineage.after(opened.facts))
    notes = notes + _changes(opened.config, config, resumed=True)
    return StartingPoint(opened, None, line, (*notes, *_left(config, line)))


def _from_scratch(config: RunConfig, notes: list[Note]) -> StartingPoint:
    line, weights = on_first_rank(Lineage.new), None
    if config.checkpoint.initial_weights is not None:
        start = time.perf_counter()
        weights = open_weights_together(
            config.checkpoint.initial_weights, verify=config.checkpoint.verify
        )
        notes = notes + _verified(weights, config, start)
        notes += _changes(weights.config, config, resumed=False)
    return StartingPoint(None, weights, line, (*notes, *_left(config, line)))


def open_weights_together(
    path: Path, *, verify: bool, key: str = INITIAL_WEIGHTS
) -> OpenedCheckpoint:
    """The checkpoint at `path`, or the latest of the run whose output directory it is. Collective.

    Raises ConfigError where there is none, which names the setting `key`, and
    DamagedCheckpointError.
    """
    found = on_first_rank(lambda: find_weights(path, key=key))
    try:
        return open_together(found, needs_state=False, verify=verify)
    except DamagedCheckpointError as error:
        raise with_way_out(error) from None


def _changes(saved: RunConfig, wanted: RunConfig, *, resumed: bool) -> list[Note]:
    changed = noted_changes(saved, wanted, resumed=resumed)
    grown = {} if resumed else grown_vocabulary(saved, wanted)
    told = [("settings_changed", changed), ("vocabulary_grown", grown)]
    return [note for note in told if note[1]]


def find_weights(path: Path, *, key: str = INITIAL_WEIGHTS) -> Path:
    """The checkpoint folder that the setting `key` names. Raises ConfigError."""
    found = directory.latest_checkpoint(path)
    if found is None:
        raise ConfigError(
            f"{key}={path}: there is no checkpoint. Name a run's output "
            "directory, or one of its checkpoints/step_... folders"
        )
    return found


def _left(config: RunConfig, line: Lineage) -> list[Note]:
    left = on_first_rank(lambda: left_alone(config.output_directory, line))
    named = "; ".join(f"{name} ({reason})" for name, reason in left.items())
    return [("left_alone", {"checkpoints": named})] if left else []


def _verified(opened: OpenedCheckpoint, config: RunConfig, start: float) -> list[Note]:
    checkpoint = {"checkpoint": opened.path.name}
    if opened.files is None:
        reason = "it is from before there were manifests, so its bits are not checked"
    elif not config.checkpoint.verify:
        reason = "checkpoint.verify=false, so its bits are not checked"
    else:
        seconds = round(time.perf_counter() - start, 3)
        return [("verified", {**checkpoint, "gib": round(opened.gib, 3), "seconds": seconds})]
    return [("unverified", {**checkpoint, "reason": reason})]


def _damage_note(error: DamagedCheckpointError) -> Note:
    return "damaged", {
        "checkpoint": error.checkpoint.name,
        "what": "; ".join(map(str, error.damages)),
    }


def _none_left(config: RunConfig, broken: list[DamagedCheckpointError]) -> DamagedCheckpointError:
    """The error for the first that was tried, which also tells of the others."""
    first, *others = broken
    damages = list(first.damages)
    for error in others:
        damages += [Damage(f"{error.checkpoint.name}/{d.file}", d.what) for d in error.damages]
    way_out = (
        "bring it back from a copy, or name another with checkpoint.resume=must "
        "checkpoint.resume_step=N"
        if config.checkpoint.resume_step is not None
        else "none before it can be used either. Bring one back from a copy, or start from scratch "
        "in another output_directory"
    )
    return DamagedCheckpointError(first.checkpoint, damages, way_out=way_out)

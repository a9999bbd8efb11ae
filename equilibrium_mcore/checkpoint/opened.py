"""Opening a checkpoint: is it whole, does it hold what it says, before anything is built from it.

Every reader comes through here: a run that resumes, initial weights, the export, the tools.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibrium_mcore.checkpoint import directory, structure
from equilibrium_mcore.checkpoint.manifest import (
    Damage,
    DamagedCheckpointError,
    Files,
    read_manifest,
    shares,
    wrong_hashes,
    wrong_sizes,
)
from equilibrium_mcore.checkpoint.safe_load import read_metadata
from equilibrium_mcore.config.schema import RunConfig

SMALL = {*structure.PLAIN, directory.STATE_FILE}  # hashed by one rank, before they are read


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was checked, and its plain facts."""

    path: Path
    facts: dict[str, Any]  # state.json; empty for weights alone that have none
    config: RunConfig  # that it was saved under
    files: Files | None  # the manifest's; None where there is none

    @property
    def gib(self) -> float:
        """Size of all files that the manifest names, in GiB."""
        return sum(facts["bytes"] for facts in (self.files or {}).values()) / 2**30

    @property
    def data_files(self) -> Files:
        """Those that `inspect` did not hash: the large ones."""
        files = self.files or {}
        return {n: f for n, f in files.items() if n not in SMALL}


def open_checkpoint(
    path: Path, *, needs_state: bool = False, verify: bool = True, workers: int = 1
) -> OpenedCheckpoint:
    """The checkpoint in the folder `path`, all its files verified by this process alone.

    Raises DamagedCheckpointError. `workers` threads hash.
    """
    opened = inspect(path, needs_state=needs_state, verify=verify)
    if verify and opened.files is not None:
        lists = shares(opened.data_files, workers)
        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(lambda names: wrong_hashes(path, opened.files, names), lists)
            damages = [damage for some in found for damage in some]
        if damages:
            raise DamagedCheckpointError(path, damages)
    return opened


def open_weights(path: Path) -> OpenedCheckpoint:
    """The checkpoint folder at `path`, or the latest of the run whose output directory it is.

    Raises FileNotFoundError where there is none, and DamagedCheckpointError.
    """
    found = directory.latest_checkpoint(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: give the output directory of a run that has saved one, "
            "or one of its checkpoints/step_... folders"
        )
    try:
        return open_checkpoint(found)
    except DamagedCheckpointError as error:
        raise with_way_out(error) from None


def with_way_out(error: DamagedCheckpointError) -> DamagedCheckpointError:
    """The error, with the other checkpoints of the run named."""
    folder = error.checkpoint.parent
    others = [p.name for p in directory.list_checkpoints(folder.parent) if p != error.checkpoint]
    if folder.name != "checkpoints" or not others:
        return error
    way_out = f"others in {folder}: {', '.join(others)}; name one of these folders instead"
    return DamagedCheckpointError(error.checkpoint, error.damages, way_out=way_out)


def inspect(path: Path, *, needs_state: bool, verify: bool = True) -> OpenedCheckpoint:
    """Everything that can be known without reading the data: names, sizes, facts, structure.

    With `verify`, hashes of the small files too. Raises DamagedCheckpointError.
    """
    path = Path(path)
    files = read_manifest(path)
    if files is not None:
        found = wrong_sizes(path, files)
        sound = files.keys() & SMALL - {damage.file for damage in found}
        _refuse(path, found + (wrong_hashes(path, files, sorted(sound)) if verify else []))
    facts = structure.read_facts(path, needed=needs_state)
    _refuse(path, structure.missing(path, facts, files))
    metadata = read_metadata(path)
    _refuse(path, [*structure.wrong_format(path), *structure.cut_short(path, metadata, files)])
    if facts:
        _refuse(path, structure.contradictions(path, facts, metadata))
    return OpenedCheckpoint(path, facts, structure.read_config(path), files)


def _refuse(path: Path, damages: Iterable[Damage]) -> None:
    if damages := list(damages):
        raise DamagedCheckpointError(path, damages)

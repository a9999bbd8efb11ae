"""What a checkpoint's small files say, and whether they agree with each other and with the data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.checkpoint.lineage import Lineage
from equilibrium_mcore.checkpoint.manifest import (
    MANIFEST_FILE,
    Damage,
    DamagedCheckpointError,
    Files,
)
from equilibrium_mcore.checkpoint.safe_load import METADATA_FILE, read_object
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.errors import reason

FORMAT_FILE = "metadata.json"  # megatron-core's
PROGRESS_KEY = "common_state/shard_0_1"  # megatron-core's name for plain values
RNG_KEY = "random_states"
PLAIN = (directory.CONFIG_FILE, FORMAT_FILE, METADATA_FILE)


def read_facts(path: Path, *, needed: bool) -> dict[str, Any]:
    """`state.json`; empty where there is none and it is not needed."""
    if not needed and not (path / directory.STATE_FILE).exists():
        return {}
    try:
        facts = directory.read_state(path)
        for key in ("step", "samples", "tokens", "world_size"):
            if not isinstance(facts[key], int):
                raise ValueError(f"{key}={facts[key]!r} is no whole number")
        if not isinstance(facts["layout"], dict):
            raise ValueError(f"layout={facts['layout']!r} is no layout")
        Lineage.of(facts)
    except FileNotFoundError:
        what = "is missing"
    except KeyError as error:
        what = f"has no {error}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        what = f"cannot be read: {reason(error)}"
    else:
        return facts
    raise DamagedCheckpointError(path, [Damage(directory.STATE_FILE, what)])


def missing(path: Path, facts: dict, files: Files | None) -> Iterator[Damage]:
    """Files that have to be there, and the one that must not."""
    if files is None and facts.get("run"):
        yield Damage(MANIFEST_FILE, "is missing, and the run that wrote state.json writes one")
    for name in PLAIN:
        if files is None and not (path / name).is_file():
            yield Damage(name, "is missing")
        elif files is not None and name not in files:
            yield Damage(MANIFEST_FILE, f"does not name {name}")
    if (path / "common.pt").exists():
        yield Damage("common.pt", "is no file of these checkpoints, and would be read: remove it")


def wrong_format(path: Path) -> Iterator[Damage]:
    """Whether megatron-core's own file names the one format that is read."""
    try:
        backend = json.loads((path / FORMAT_FILE).read_text(encoding="utf-8"))["sharded_backend"]
        if backend != "torch_dist":
            yield Damage(FORMAT_FILE, f"sharded_backend={backend!r}, expected 'torch_dist'")
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Damage(FORMAT_FILE, f"cannot be read: {reason(error)}")


def cut_short(path: Path, metadata: Metadata, files: Files | None) -> Iterator[Damage]:
    """Files of the data that are gone, or end before what `.metadata` says lies in them."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    for name, end in sorted(ends.items()):
        if files is not None and name not in files:
            yield Damage(MANIFEST_FILE, f"does not name {name}")
        if not (path / name).is_file():
            yield Damage(name, f"is missing; expected at least {end:,} bytes")
        elif (size := (path / name).stat().st_size) < end:
            yield Damage(name, f"expected at least {end:,} bytes, found {size:,}")


def contradictions(path: Path, facts: dict, metadata: Metadata) -> Iterator[Damage]:
    """Where state.json says other things than the folder's name and the saved state."""
    named = directory.step_of(path)
    if named is not None and named != facts["step"]:
        yield Damage(directory.STATE_FILE, f"step={facts['step']}, but the folder is {path.name}")
    entries = metadata.state_dict_metadata
    if isinstance(entries.get(PROGRESS_KEY), BytesStorageMetadata):
        saved = _saved_progress(path, metadata)
        for key in sorted(saved):
            if facts.get(key) != saved[key]:
                found, held = (str(value)[:60] for value in (facts.get(key), saved[key]))
                yield Damage(
                    directory.STATE_FILE, f"{key}={found}, but the saved state holds {held}"
                )
    ranks = {key.rpartition("_")[2] for key in entries if key.startswith(f"{RNG_KEY}/shard_")}
    if ranks and ranks != {str(facts["world_size"])}:
        yield Damage(
            directory.STATE_FILE,
            f"world_size={facts['world_size']}, but {', '.join(sorted(ranks))} ranks saved it",
        )


def _saved_progress(path: Path, metadata: Metadata) -> dict[str, Any]:
    """Step, samples, tokens and ledger as they were saved with the state."""
    try:
        progress = read_object(path, metadata, PROGRESS_KEY)[0].get("progress", {})
        return json.loads(json.dumps(progress))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        damage = Damage(METADATA_FILE, f"leads to no progress: {reason(error)}")
        raise DamagedCheckpointError(path, [damage]) from None


def read_config(path: Path) -> RunConfig:
    """The config that the checkpoint was saved under."""
    try:
        return load_run(path / directory.CONFIG_FILE)
    except (ConfigError, UnicodeDecodeError) as error:
        damage = Damage(directory.CONFIG_FILE, f"cannot be read: {error}")
        raise DamagedCheckpointError(path, [damage]) from None

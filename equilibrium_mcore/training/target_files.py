"""A teacher's likeliest ids on disk: rows of fixed size, memory-mapped, by their sample's key.

    settings.json            what they were made with; written first
    part_0003_000012.npy     samples of data rank 3: key, ids, log q of ids and of the rest
    manifest.json            sizes and hashes of all files; written last, so that what has none is
                             unfinished, and is gone on with

A key is a hash of all that a sample is (tokens, labels, positions, mask): other data, another
packing or another template gives other keys. A row takes 8 + S * (8 * K + 4) bytes.

Shapes: S positions, K likeliest ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from equilibrium_mcore.checkpoint.choose import find_weights
from equilibrium_mcore.checkpoint.manifest import (
    HASH,
    Files,
    describe_file,
    read_manifest,
    write_manifest,
    wrong_sizes,
)
from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint, inspect
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.errors import reason
from equilibrium_mcore.files.whole import whole_file, write_whole

SETTINGS_FILE = "settings.json"
SAMPLE = ("tokens", "labels", "position_ids", "loss_mask")
PARTS = "part_*.npy"


def row_type(length: int, top_k: int) -> np.dtype:
    """A sample: key, ids [S, K], log q [S, K + 1], the rest of the vocabulary last."""
    return np.dtype(
        [
            ("key", "<u8"),
            ("ids", "<i4", (length, top_k)),
            ("log_q", "<f4", (length, top_k + 1)),
        ]
    )


def sample_keys(batch: dict[str, Tensor]) -> np.ndarray:
    """The key of every row of a whole micro-batch, uint64 [B]."""
    rows = zip(*(batch[name].cpu() for name in SAMPLE), strict=True)
    return np.array([_key(row) for row in rows], dtype="<u8")


def _key(row: Iterable[Tensor]) -> int:
    state = blake2b(digest_size=8)
    for values in row:
        state.update(np.ascontiguousarray(values.numpy()).tobytes())
    return int.from_bytes(state.digest(), "little")


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What a run needs of targets; by the names of its settings, as plain values."""
    objective = config.objective
    return {
        "objective.top_k": objective.top_k,
        "objective.temperature": objective.temperature,
        "training.sequence_length": config.training.sequence_length,
        "model.vocab_size": config.model.vocab_size,
        "data.type": config.data.type,
        "data.packing": config.data.packing,
        "data.document_multiple": config.data.document_multiple,
    }


def identity_of(teacher: OpenedCheckpoint) -> dict[str, str]:
    """The weights of a checkpoint by their hash. Raises ConfigError for one without a manifest."""
    if teacher.files is None:
        raise ConfigError(
            f"{teacher.path}: it has no manifest.json, so its weights have no hash; resume its run "
            "for a step and save it again"
        )
    hashes = sorted((name, facts[HASH]) for name, facts in teacher.data_files.items())
    digest = blake2b(json.dumps(hashes).encode(), digest_size=32).hexdigest()
    return {"path": str(teacher.path), "weights": digest}


def write_settings(folder: Path, config: RunConfig, teacher: OpenedCheckpoint) -> None:
    """Begin a folder, or find it begun for the same run. Raises ConfigError for another."""
    if not (folder / SETTINGS_FILE).exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"objective.targets={folder}: a folder with other files; name one that is empty or "
                "not there"
            )
        values = {"teacher": identity_of(teacher), "settings": settings_of(config)}
        write_whole(folder / SETTINGS_FILE, json.dumps(values, indent=1) + "\n")
    check_settings(folder, config, teacher)


def check_settings(folder: Path, config: RunConfig, teacher: OpenedCheckpoint | None) -> None:
    """Raise ConfigError where targets were made for other settings, or of another teacher.

    `teacher` None: only the settings are compared.
    """
    found = _read_settings(folder)
    problems = [
        f"{name}={wanted!r}, and the targets were made with {found['settings'].get(name)!r}"
        for name, wanted in settings_of(config).items()
        if found["settings"].get(name) != wanted
    ]
    if teacher is not None and identity_of(teacher)["weights"] != found["teacher"]["weights"]:
        problems.append(
            f"objective.teacher: {teacher.path} has other weights than the teacher that the "
            f"targets are of ({found['teacher']['path']})"
        )
    if problems:
        raise ConfigError(
            [*problems, f"put it back, or make others in another folder: {_made_by()}"],
            source=f"objective.targets={folder}",
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["settings"], dict) or not {*values["teacher"]} >= {"weights"}:
            raise ValueError("its keys are others")
        return values
    except FileNotFoundError:
        raise ConfigError(
            f"objective.targets={folder}: there are no targets: make them with {_made_by()}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {reason(error)}; make the targets again in another folder: "
            f"{_made_by()}"
        ) from None


def _made_by() -> str:
    return f"{command('store-targets')} RUN.yaml"


def is_whole(folder: Path) -> bool:
    """Whether all of the targets were made."""
    return read_manifest(folder) is not None


def finish(folder: Path) -> int:
    """Write the manifest; the bytes of all parts."""
    names = [SETTINGS_FILE, *sorted(path.name for path in folder.glob(PARTS))]
    files = {name: describe_file(folder / name) for name in names}
    write_manifest(folder, files)
    return sum(facts["bytes"] for facts in files.values())


def check_files(folder: Path) -> Files:
    """The files of the manifest, if all are there in their sizes. Raises ConfigError."""
    files = read_manifest(folder)
    if files is None:
        raise ConfigError(
            f"objective.targets={folder}: they are not finished (no manifest.json): go on with "
            f"{_made_by()}"
        )
    if damages := wrong_sizes(folder, files):
        raise damaged(folder, damages)
    return files


def check_stored_targets(config: RunConfig) -> None:
    """Raise ConfigError unless the run's targets are whole, and were made for it.

    The teacher's weights are compared where the run names a teacher; contents are not read.
    """
    objective = config.objective
    teacher = None
    if objective.teacher is not None:
        path = find_weights(objective.teacher, key="objective.teacher")
        teacher = inspect(path, needs_state=False)
    check_settings(objective.targets, config, teacher)
    check_files(objective.targets)


def damaged(folder: Path, damages: Sequence[object]) -> ConfigError:
    """The error for files that are not what the manifest says."""
    ways = f"bring them back from a copy, or make them again in another folder: {_made_by()}"
    return ConfigError([*map(str, damages), ways], source=f"objective.targets={folder}")


class PartWriter:
    """Rows of one data rank, written as whole files of about `most_bytes`."""

    def __init__(self, folder: Path, *, rank: int, dtype: np.dtype, most_bytes: int) -> None:
        self._folder, self._rank, self._dtype = folder, rank, dtype
        self._most = max(1, most_bytes // dtype.itemsize)
        self._rows: list[np.ndarray] = []
        numbers = [int(path.stem.rsplit("_", 1)[1]) for path in folder.glob(PARTS)]
        self._next = max(numbers, default=-1) + 1

    def add(self, key: int, ids: np.ndarray, log_q: np.ndarray) -> None:
        """One sample."""
        self._rows.append(np.array((key, ids, log_q), dtype=self._dtype))
        if len(self._rows) >= self._most:
            self.flush()

    def flush(self) -> None:
        """Write what is left."""
        if not self._rows:
            return
        name = f"part_{self._rank:04d}_{self._next:06d}.npy"
        with whole_file(self._folder / name, "wb") as stream:
            np.save(stream, np.stack(self._rows))
        self._rows, self._next = [], self._next + 1


class TargetRows:
    """The rows of all parts by key, memory-mapped."""

    def __init__(self, folder: Path, names: Iterable[str], dtype: np.dtype) -> None:
        """Raises ConfigError for a part that is none."""
        self._parts: list[np.ndarray] = []
        for name in names:
            self._parts.append(_part(folder, name, dtype))
        keys = [np.asarray(part["key"]) for part in self._parts]
        counts = [len(part) for part in keys]
        self._keys = np.concatenate(keys) if keys else np.empty(0, "<u8")
        order = np.argsort(self._keys, kind="stable")
        self._keys = self._keys[order]
        self._part = np.repeat(np.arange(len(counts)), counts)[order]
        self._row = np.concatenate([np.arange(n) for n in counts] or [np.empty(0, int)])[order]

    def find(self, key: int) -> np.ndarray | None:
        """The row of a sample, a view of the file; None where there is none."""
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        if place == len(self._keys) or int(self._keys[place]) != key:
            return None
        return self._parts[int(self._part[place])][int(self._row[place])]

    def __contains__(self, key: int) -> bool:
        return self.find(key) is not None


def _part(folder: Path, name: str, dtype: np.dtype) -> np.ndarray:
    try:
        found = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise damaged(folder, [f"{name}: cannot be read: {reason(error)}"]) from None
    if found.dtype != dtype or found.ndim != 1:
        raise damaged(folder, [f"{name}: holds rows of another shape"])
    return found

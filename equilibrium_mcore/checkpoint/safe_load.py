"""Reading a checkpoint without executing anything that is in it.

`.metadata` and the objects in `.distcp` files are pickles, which may name any function to be called
while they are read. torch reads both without a limit (`FileSystemReader.read_metadata`,
`DefaultLoadPlanner.load_bytes`), and megatron-core through it. Here the names are listed.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from numpy._core.multiarray import _reconstruct
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from equilibrium_mcore.checkpoint.manifest import Damage, DamagedCheckpointError
from equilibrium_mcore.files.errors import reason

ROLES_PREFIX = "roles."  # what names of models that train beside a run's own begin with
METADATA_FILE = ".metadata"
SMALL_BYTES = 4 << 20  # of `.metadata`, up to which reading it slowly is no loss
# What torch 2.4 to 2.11 write into `.metadata`: dataclasses, enums, and a table's look-up.
_METADATA = "torch.distributed.checkpoint.metadata"
IN_METADATA = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}
# What numpy's random state needs beyond torch's own list of tensors and plain containers.
IN_OBJECTS = [
    _reconstruct,
    numpy.ndarray,
    numpy.dtype,
    numpy.dtypes.UInt32DType,
    (_reconstruct, "numpy.core.multiarray._reconstruct"),  # as numpy 1 called it
]
# The reader's own, before `allowed_classes_only` puts ours in its place.
_READ_DATA = dcp.FileSystemReader.read_data
_NOT_ALLOWED = re.compile(r"(?:GLOBAL|[Gg]lobal|[Cc]lass|import)\s+([\w.]+\.[\w.]+)")


class _NotAllowedError(pickle.UnpicklingError):
    pass


class _AllowedClasses:
    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in IN_METADATA
        if allowed or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise _NotAllowedError(f"{module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a checkpoint: which global tensors there are, and where their bytes lie.

    Raises DamagedCheckpointError for one that is broken, that names a class outside of
    IN_METADATA, or that names files elsewhere.
    """
    try:
        with (folder / METADATA_FILE).open("rb") as stream:
            metadata = _unpickle(stream, os.fstat(stream.fileno()).st_size)
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"it names {info.relative_path!r}, outside of the checkpoint")
            if not 0 <= info.offset <= info.offset + info.length:
                raise ValueError(f"it names {info.length} bytes at {info.offset}")
    except Exception as error:  # a broken pickle raises whatever its bytes make it raise
        what = f"cannot be read: {reason(error)}"
        if isinstance(error, _NotAllowedError):
            what = _refused(str(error))
        raise DamagedCheckpointError(folder, [Damage(METADATA_FILE, what)]) from None
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


class _FastUnpickler(_AllowedClasses, pickle.Unpickler):
    pass


class _FrugalUnpickler(_AllowedClasses, pickle._Unpickler):
    """The one in Python: a flipped bit may make the other take all memory for a table's index."""


def _unpickle(stream: IO[bytes], size: int) -> Metadata:
    unpickler = _FrugalUnpickler if size <= SMALL_BYTES else _FastUnpickler
    metadata = unpickler(stream).load()
    tables = getattr(metadata, "storage_data", None), getattr(metadata, "state_dict_metadata", None)
    if not isinstance(metadata, Metadata) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"it holds a {type(metadata).__name__}, no metadata of a checkpoint")
    return metadata


def read_object(folder: Path, metadata: Metadata, key: str) -> Any:
    """The object saved under `key`, of plain values, tensors and arrays."""
    info = metadata.storage_data[MetadataIndex(key)]
    path = folder / info.relative_path
    with _named_damage(folder, info.relative_path), path.open("rb") as stream:
        stream.seek(info.offset)
        return _load_object(io.BytesIO(stream.read(info.length)))


def _load_object(value: IO[bytes]) -> Any:
    with torch.serialization.safe_globals(IN_OBJECTS):
        return torch.load(value, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _named_damage(folder: Path, file: str) -> Iterator[None]:
    """What goes wrong inside, while `file` is read, as a DamagedCheckpointError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        found = _NOT_ALLOWED.search(str(error))
        unsafe = isinstance(error, pickle.UnpicklingError) and found
        first = (str(error).splitlines() or [""])[0][:200]
        what = _refused(found.group(1)) if unsafe else f"cannot be read: {first}"
        raise DamagedCheckpointError(folder, [Damage(file, what)]) from error


def _refused(name: str) -> str:
    return (
        f"its pickle names {name}, which is no class of a checkpoint. Nothing of it was executed: "
        "take the checkpoint from where it was written"
    )


# ------------------------------------------------------------------------------- torch's classes


def _reader_metadata(reader: dcp.FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    metadata = read_metadata(Path(reader.path))
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def _reader_data(reader: dcp.FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future:
    files: dict[str, list[ReadItem]] = {}
    for item in plan.items:
        files.setdefault(reader.storage_data[item.storage_index].relative_path, []).append(item)
    for name, items in files.items():
        with _named_damage(Path(reader.path), name):
            _READ_DATA(reader, replace(plan, items=items), planner)
    return _READ_DATA(reader, replace(plan, items=[]), planner)


def _planner_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    # torch's own, but for `_load_object`.
    name = read_item.dest_index.fqn
    if planner.flatten_state_dict:
        path = planner.mappings[name]
        set_element(planner.original_state_dict, path, _load_object(value))
    else:
        planner.state_dict[name] = _load_object(value)


class SafeReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint folder, which unpickles allowed classes alone, and once."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = _reader_metadata(self)
        return self._metadata

    read_data = _reader_data


class SafePlanner(DefaultLoadPlanner):
    """torch's load planner, which unpickles allowed classes alone."""

    load_bytes = _planner_bytes


@contextlib.contextmanager
def allowed_classes_only() -> Iterator[None]:
    """Inside, whatever loads through torch's reader or planner, as megatron-core does, is safe.

    megatron-core takes no reader or planner from outside (`load_common_state_dict`,
    `TorchDistLoadShardedStrategy.load`), so the methods are exchanged and put back.
    """
    exchanged = [
        (dcp.FileSystemReader, "read_metadata", _reader_metadata),
        (dcp.FileSystemReader, "read_data", _reader_data),
        (DefaultLoadPlanner, "load_bytes", _planner_bytes),
    ]
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in exchanged]
    try:
        for owner, name, method in exchanged:
            setattr(owner, name, method)
        yield
    except CheckpointException as error:  # torch wraps what a rank raised
        for failure, _ in error.failures.values():
            if isinstance(failure, DamagedCheckpointError):
                raise failure from None
        raise
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)

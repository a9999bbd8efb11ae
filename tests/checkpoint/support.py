"""A small model, crafted checkpoints, and ways to damage one."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from equilibrium_mcore.checkpoint.manifest import (
    MANIFEST_FILE,
    describe_file,
    read_manifest,
    write_manifest,
)
from tests.support.runs import MODEL as WHOLE_MODEL

MODEL = {**WHOLE_MODEL, "layer_pattern": "M-"}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def flip(path: Path, *, at: float = 0.5) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut a file in its middle."""
    os.truncate(path, path.stat().st_size // 2)


def reseal(checkpoint: Path) -> None:
    """Write a manifest that fits what is there now, as whoever crafts a checkpoint would."""
    files = read_manifest(checkpoint)
    write_manifest(checkpoint, {name: describe_file(checkpoint / name) for name in files})


def make_old(checkpoint: Path, **facts: Any) -> None:
    """Make a checkpoint what it was before there were manifests and run ids."""
    (checkpoint / MANIFEST_FILE).unlink()
    change_state(checkpoint, run=None, **facts)


def change_state(checkpoint: Path, **facts: Any) -> None:
    """Change `state.json`; None removes a key."""
    path = checkpoint / "state.json"
    values = {**json.loads(path.read_text()), **facts}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def plant_in_metadata(checkpoint: Path, evil: object) -> None:
    """Put an object into the pickle of `.metadata`."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # our own, made by this test
    metadata.planner_data = evil
    path.write_bytes(pickle.dumps(metadata))
    reseal(checkpoint)


def plant_object(checkpoint: Path, key: str, value: object) -> str:
    """Put an object into the data under `key`; the name of the file."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == key)
    info = metadata.storage_data[index]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with (checkpoint / info.relative_path).open("ab") as stream:
        start = stream.tell()
        stream.write(buffer.getvalue())
    length = len(buffer.getvalue())
    metadata.storage_data[index] = replace(info, offset=start, length=length)
    path.write_bytes(pickle.dumps(metadata))
    reseal(checkpoint)
    return info.relative_path

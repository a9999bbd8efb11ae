"""Reads the model's tensors of a megatron-core distributed checkpoint, one at a time.

A checkpoint holds global tensors, whatever layout wrote it, so no process group and no Megatron
model is needed: torch.distributed.checkpoint alone reads them, with the memory of one tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

MODEL_PREFIX = ""  # what stands before the model's own names
# Names of everything else start with one of these.
OTHER_STATE = ("optimizer.", "optimizer_state.", "rng_state", "common_state", "schedule", "data.")


class _Reader(dcp.FileSystemReader):
    """FileSystemReader that unpickles the metadata once, not for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


class CheckpointReader:
    """The model's tensors in the checkpoint folder `directory`, by their Megatron names.

    Raises FileNotFoundError when the folder holds no distributed checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / ".metadata").is_file():
            raise FileNotFoundError(
                f"{directory} is no distributed checkpoint: it holds no .metadata file. Give the "
                f"output directory of a run, or one of its checkpoints/step_... folders"
            )
        self.directory = directory
        self._reader = _Reader(directory)
        self._entries = {
            name.removeprefix(MODEL_PREFIX): entry
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and name.startswith(MODEL_PREFIX)
            and not name.startswith(OTHER_STATE)
        }

    def names(self) -> list[str]:
        """Names of the model's tensors."""
        return list(self._entries)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU, in the dtype it was saved in."""
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        dcp.load({MODEL_PREFIX + name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

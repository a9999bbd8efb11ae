"""Reads the model's tensors of a megatron-core distributed checkpoint, one at a time.

A checkpoint holds global tensors, whatever layout wrote it, so no process group and no Megatron
model is needed: torch.distributed.checkpoint alone reads them, with the memory of one tensor.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from equilibrium_mcore.checkpoint.safe_load import ROLES_PREFIX, SafePlanner, SafeReader

MODEL_PREFIX = ""  # what stands before the model's own names
OPTIMIZER_PREFIX = "optimizer."  # of everything that optimizers keep
OTHERS = (OPTIMIZER_PREFIX, ROLES_PREFIX)
MAIN_WEIGHTS_PREFIX = "optimizer.main."  # float32 copies of weights that train in bfloat16


class CheckpointReader:
    """The model's tensors in the checkpoint folder `directory`, by their Megatron names.

    With `main_weights`, a weight that the optimizer keeps in float32 beside the model's own is read
    from there. Raises FileNotFoundError when the folder holds no distributed checkpoint.
    """

    def __init__(self, directory: Path, *, main_weights: bool = False) -> None:
        if not (directory / ".metadata").is_file():
            raise FileNotFoundError(
                f"{directory} is no distributed checkpoint: it holds no .metadata file. Give the "
                f"output directory of a run, or one of its checkpoints/step_... folders"
            )
        self._reader = SafeReader(directory)
        # Other entries are pickled objects: random states, progress, empty extra states.
        tensors = {
            name: entry
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._entries = {
            name.removeprefix(MODEL_PREFIX): (name, entry)
            for name, entry in tensors.items()
            if name.startswith(MODEL_PREFIX) and not name.startswith(OTHERS)
        }
        if main_weights:
            for name in self._entries:
                main = MAIN_WEIGHTS_PREFIX + name
                if main in tensors:
                    self._entries[name] = main, tensors[main]

    def names(self) -> list[str]:
        """Names of the model's tensors."""
        return list(self._entries)

    def key_of(self, name: str) -> str:
        """What the checkpoint calls the tensor `name`: another name where it is a main weight."""
        return self._entries[name][0] if name in self._entries else name

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU, in the dtype it was saved in."""
        key, entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        with warnings.catch_warnings():
            # That no process group is there is what no_dist asks for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                {key: tensor}, storage_reader=self._reader, planner=SafePlanner(), no_dist=True
            )
        return tensor

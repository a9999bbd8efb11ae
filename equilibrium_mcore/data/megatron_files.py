"""megatron-core's datasets over files that are checked while they are read.

`IndexedDataset` maps its .bin, which ends the process by SIGBUS when the file is cut short; without
a map (`mmap=False`) it takes a short read for a whole one. Here its reader is ours. Its .idx stays
mapped, and its size is looked at before each use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from equilibrium_mcore.data.indexed_files import dataset_paths
from equilibrium_mcore.data.open_files import OpenFiles


class CheckedReader:
    """megatron-core's `_BinReader` by `OpenFiles`."""

    def __init__(self, binary: Path, index: Path) -> None:
        self._binary, self._index, self._files = binary, index, OpenFiles()
        for path in (binary, index):
            self._files.expect(path)

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        """`count` values from byte `offset` on. Raises ValueError where a file has changed."""
        return self._files.read(self._binary, dtype, offset=int(offset), count=int(count))

    def check_index(self) -> None:
        """Raise ValueError where the .idx has changed; to be called before its map is used."""
        self._files.check(self._index)


class CheckedIndexedDataset(IndexedDataset):
    """An `IndexedDataset` whose files may not change."""

    def initialize(self, path_prefix: str, multimodal: bool, mmap: bool, *rest: Any) -> None:
        """As megatron-core does it, also after unpickling, with another reader."""
        super().initialize(path_prefix, multimodal, False, *rest)
        self.bin_reader = CheckedReader(*dataset_paths(path_prefix)[:2])

    def __getitem__(self, idx: Any) -> Any:
        """Token ids of a sequence, or of several. Raises ValueError where a file has changed."""
        self.bin_reader.check_index()
        return super().__getitem__(idx)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Any:
        """`length` token ids of a sequence. Raises ValueError where a file has changed."""
        self.bin_reader.check_index()
        return super().get(idx, offset, length)


class CheckedGPTDataset(GPTDataset):
    """A `GPTDataset` over one."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        """The source's documents."""
        return CheckedIndexedDataset(dataset_path, multimodal=False)

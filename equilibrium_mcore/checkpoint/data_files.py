"""One rank's data file of a checkpoint: what goes into it, and how it is written.

The bytes are those of megatron-core's own writer: torch's `_write_item`, item after item. Of large
packages torch alone is imported, since the process that writes beside training imports this too.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from equilibrium_mcore.checkpoint.manifest import describe_file
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.files.named import NamedFile
from equilibrium_mcore.files.whole import sync_stream


@dataclass(frozen=True)
class DataFile:
    """A file `path` that the checkpoint's metadata calls `name`: objects first, then tensors."""

    path: Path
    name: str
    objects: Sequence[tuple[WriteItem, bytes]]
    tensors: Sequence[tuple[WriteItem, Tensor]]

    @property
    def items(self) -> Iterator[tuple[WriteItem, Any]]:
        """What is written, in order, as `_write_item` takes it."""
        for item, content in self.objects:
            yield item, io.BytesIO(content)
        for item, tensor in self.tensors:
            yield item, _alone(tensor)


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, and not part of a larger memory, all of which torch would write."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@dataclass(frozen=True)
class WrittenFile:
    """Where each item lies, for the checkpoint's metadata, and the file's entry of the manifest."""

    name: str
    results: list[WriteResult]
    facts: dict[str, Any]


def write_data_file(file: DataFile) -> WrittenFile:
    """Write the file, bring it to the disk, hash it. Raises OSError, which names the file."""
    transforms, results = _StorageWriterTransforms(), []
    with naming(file.path):
        disk = _RefusalsKept(file.path, "wb")  # not whole: its folder has no final name yet
        with disk.refusals_raised(), io.BufferedWriter(disk) as stream:
            for item, content in file.items:
                arguments = (transforms, stream, content, item, file.name)
                results.append(_write_item(*arguments, SerializationFormat.TORCH_SAVE))
            sync_stream(stream)
        return WrittenFile(file.path.name, results, describe_file(file.path))


class _RefusalsKept(NamedFile):
    """A file that keeps the error of the operating system which a write met.

    torch's writer makes a RuntimeError of it, which speaks of positions in a zip file.
    """

    _refusal: OSError | None = None

    def write(self, content: Any) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            self._refusal = error
            raise

    @contextlib.contextmanager
    def refusals_raised(self) -> Iterator[None]:
        """Where something inside fails after such an error, that error is raised."""
        try:
            yield
        except Exception:
            if self._refusal is not None:
                raise self._refusal from None
            raise

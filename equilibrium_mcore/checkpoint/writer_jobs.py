"""What a rank asks of the process that writes its data files: messages on the pipe between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.distributed.checkpoint.planner import WriteItem

from equilibrium_mcore.checkpoint.shared_buffer import Slot


class FileToWrite(NamedTuple):
    """A `DataFile` whose tensors lie in the shared buffer."""

    path: str
    name: str
    objects: Sequence[tuple[WriteItem, bytes]]
    slots: Sequence[tuple[WriteItem, Slot]]


class WriteJob(NamedTuple):
    """The files of one save, and the size of the buffer that holds their tensors."""

    files: Sequence[FileToWrite]
    buffer_bytes: int


class Reservation(NamedTuple):
    """Pages of the buffer to find before they are written to; there is no answer."""

    buffer_bytes: int


class Removal(NamedTuple):
    """A folder of old files to remove; there is no answer."""

    path: str

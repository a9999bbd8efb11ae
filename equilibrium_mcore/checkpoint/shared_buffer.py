"""Memory that two processes of a host see: one copies tensors into it, the other writes them.

The memory is an unnamed file that grows and is reused from one save to the next: pages are found
once. On Linux it is no file of any folder, so the size of /dev/shm does not bound it. It goes with
the last process that has it open, whatever ends that one.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element's size


class Slot(NamedTuple):
    """Where a tensor lies: its first byte, its type and its shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SharedBuffer:
    """The buffer of one process, and, opened by its descriptor, of another."""

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _unnamed_file() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None
        self._pinned = 0  # address that CUDA knows, or 0

    @property
    def size(self) -> int:
        """Bytes that are mapped here."""
        return 0 if self._map is None else len(self._map)

    def copy_in(self, tensors: Sequence[Tensor]) -> list[Slot]:
        """Copy tensors of any device, one after the other; the buffer grows where it must."""
        slots, end = [], 0
        for tensor in tensors:
            slots.append(Slot(end, tensor.dtype, tuple(tensor.shape)))
            end += -(-slots[-1].bytes // ALIGNMENT) * ALIGNMENT
        self.grow(end)
        on_device = False
        for slot, tensor in zip(slots, tensors, strict=True):
            on_device |= tensor.is_cuda
            self.tensor(slot).copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if on_device:
            torch.cuda.synchronize()
        return slots

    def tensor(self, slot: Slot) -> Tensor:
        """The tensor of a slot, without a copy."""
        if not slot.bytes:
            return torch.empty(slot.shape, dtype=slot.dtype)
        count = math.prod(slot.shape)
        flat = torch.frombuffer(self._map, dtype=slot.dtype, count=count, offset=slot.offset)
        return flat.view(slot.shape)

    def map_first(self, size: int) -> None:
        """Map the first `size` bytes, which the other process has made."""
        if size != self.size:
            self._map = mmap.mmap(self.descriptor, size)

    def find_pages(self, size: int) -> None:
        """Take the memory now: to find a page at its first write costs more than to write it."""
        if size and hasattr(os, "posix_fallocate"):
            with contextlib.suppress(OSError):  # less memory than that is found out by the save
                os.posix_fallocate(self.descriptor, 0, size)

    def close(self) -> None:
        """Give the memory back; tensors of it keep what they hold."""
        self._unpin()
        self._map = None
        os.close(self.descriptor)

    def grow(self, size: int) -> None:
        """Have at least `size` bytes; what was in the buffer is of no more use."""
        if size <= self.size:
            return
        self._unpin()
        self._map = None
        os.ftruncate(self.descriptor, size)
        self.map_first(size)
        if torch.cuda.is_initialized():  # copies from a device are direct into pinned memory
            address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            self._pinned = address

    def _unpin(self) -> None:
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._pinned))
            self._pinned = 0


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("checkpoint")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

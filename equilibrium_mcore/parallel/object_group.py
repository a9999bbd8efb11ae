"""The group of all ranks for Python objects: gloo's, so that they pass through no GPU.

On a host without CUDA that is the default group. torch alone is imported, since what reads and
writes checkpoints needs it before megatron-core.
"""

from __future__ import annotations

from datetime import timedelta

import torch

_group: torch.distributed.ProcessGroup | None = None


def object_group() -> torch.distributed.ProcessGroup:
    """The group; the default group where none was created."""
    return torch.distributed.group.WORLD if _group is None else _group


def create(*, timeout_minutes: int) -> None:
    """Create it beside a default group of another backend. Collective."""
    global _group
    _group = torch.distributed.new_group(
        backend="gloo", timeout=timedelta(minutes=timeout_minutes), group_desc="objects"
    )


def forget() -> None:
    """Drop it; it ends with all other groups."""
    global _group
    _group = None

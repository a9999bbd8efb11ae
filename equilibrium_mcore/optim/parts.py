"""The parts of a matrix that act as linear maps by themselves, cut out of and put back into ranks.

A weight that fuses several maps (query, key and value; gate and up) is cut along its output rows.
Under tensor parallelism its parts are put together from the slices of all ranks first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Parts:
    """How the rows of a whole matrix fall into maps."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # rows of each part in one block
    blocks: int = 1  # how often the sizes repeat, e.g. once per head
    # Whether each tensor-parallel rank holds a share of every part, as megatron-core lays out
    # layers that it fuses itself; otherwise ranks hold consecutive rows of the whole.
    shared_out: bool = False


def part_shapes(whole: tuple[int, ...], parts: Parts | None) -> list[tuple[int, int]]:
    """(rows, columns) of the parts of a matrix of shape `whole`."""
    rows, columns = whole
    if parts is None:
        return [(rows, columns)]
    return [(size * parts.blocks, columns) for size in parts.sizes]


def whole_parts(
    local: Tensor, parts: Parts | None, *, group: ProcessGroup, dim: int | None
) -> list[Tensor]:
    """The parts of the whole matrix, gathered over tensor-parallel ranks. Collective.

    Args:
        local: this rank's slice.
        dim: the dimension in which `group` holds slices; None where every rank has the whole.
    """
    if dim is None:
        return split_rows(local, parts)
    slices = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(slices, local.contiguous(), group=group)
    if dim == 0 and parts is not None and parts.shared_out:
        cut = [split_rows(piece, parts, ways=group.size()) for piece in slices]
        return [torch.cat(pieces, dim=0) for pieces in zip(*cut, strict=True)]
    return split_rows(torch.cat(slices, dim=dim), parts)


def local_slice(
    wholes: list[Tensor], parts: Parts | None, *, group: ProcessGroup, dim: int | None
) -> Tensor:
    """The inverse of `whole_parts`: this rank's slice."""
    if dim == 0 and parts is not None and parts.shared_out:
        mine = [whole.chunk(group.size(), dim=0)[group.rank()] for whole in wholes]
        return join_rows(mine, parts)
    whole = join_rows(wholes, parts)
    return whole if dim is None else whole.chunk(group.size(), dim=dim)[group.rank()]


def split_rows(matrix: Tensor, parts: Parts | None, *, ways: int = 1) -> list[Tensor]:
    """Cut rows into parts; with `ways`, those of a rank that holds one share of every part."""
    if parts is None:
        return [matrix]
    if parts.blocks == 1:
        return list(matrix.split([size // ways for size in parts.sizes], dim=0))
    by_block = matrix.unflatten(0, (parts.blocks, sum(parts.sizes)))
    return [part.flatten(0, 1) for part in by_block.split(parts.sizes, dim=1)]


def join_rows(pieces: list[Tensor], parts: Parts | None) -> Tensor:
    """The inverse of `split_rows`."""
    if parts is None or parts.blocks == 1:
        return torch.cat(pieces, dim=0)
    by_block = [piece.unflatten(0, (parts.blocks, -1)) for piece in pieces]
    return torch.cat(by_block, dim=1).flatten(0, 1)

"""The tensors of a model in memory, gathered one at a time over the ranks that hold its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor

from equilibrium_mcore.checkpoint.pieces import TensorShard, assemble, parts_of, piece_of
from equilibrium_mcore.checkpoint.together import on_first_rank
from equilibrium_mcore.hugging_face.source import TensorSource
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.object_group import object_group

STOP = -1  # asked for when no further tensor is wanted


@dataclass(frozen=True)
class _Held:
    """Where a piece is."""

    rank: int
    shape: tuple[int, ...]  # of the whole
    offset: tuple[int, ...]
    size: tuple[int, ...]  # of the piece
    dtype: torch.dtype


class LiveTensors:
    """A TensorSource: the model in `chunks`, with the names and the bits of a checkpoint.

    Made together by all ranks, from the checkpoint's own map of the layout. It reads the weights as
    they are when they are read: those that a run saves, inside `run.weights("evaluation")`.

    Args:
        chunks: this rank's model chunks, wrapped or not.
    """

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self._mine: dict[str, list[ShardedTensor | ShardedTensorFactory]] = {}
        here: dict[str, list[_Held]] = {}
        for placed in _placed(chunks):
            for piece in _main_pieces(placed):
                held = here.setdefault(piece.name, [])
                held.append(_held(piece))
                entries = self._mine.setdefault(piece.name, [])
                if not any(entry is placed for entry in entries):
                    entries.append(placed)
        everywhere: list[dict[str, list[_Held]]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, here, group=object_group())
        self._held: dict[str, list[_Held]] = {}
        for of_rank in everywhere:
            for name, held in of_rank.items():
                self._held.setdefault(name, []).extend(held)

    def names(self) -> list[str]:
        """Names of the model's tensors, in the same order on every rank."""
        return list(self._held)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU of every rank, in the model's dtype. Collective.

        Memory is that of the tensor and one rank's piece of it.
        """
        return assemble(self._pieces(name))[name].data

    def on_first_rank[T](self, use: Callable[[TensorSource], T]) -> T:
        """What `use` makes of the tensors on rank 0; what it raises there, too. Collective.

        The other ranks send their pieces of each tensor that it reads, in any order, and hold no
        whole one.
        """
        if torch.distributed.get_rank() == 0:
            return on_first_rank(lambda: self._use(use))
        while (index := _asked_for()) != STOP:
            for _ in self._pieces(self.names()[index]):
                pass
        return on_first_rank(lambda: None)

    def _use[T](self, use: Callable[[TensorSource], T]) -> T:
        try:
            return use(_Asking(self))
        finally:
            _asked_for(STOP)

    def _pieces(self, name: str) -> Iterator[TensorShard]:
        """Every piece of the tensor, one after the other, on every rank. Collective."""
        for held in self._held[name]:
            if held.rank == torch.distributed.get_rank():
                data = self._own(name, held.offset)
            else:
                data = torch.empty(held.size, dtype=held.dtype, device=accelerator.device())
            # As bytes: not every backend sends every dtype, and no bit may change.
            torch.distributed.broadcast(data.view(-1).view(torch.uint8), src=held.rank)
            yield TensorShard(name, held.shape, held.offset, data.cpu())

    def _own(self, name: str, offset: tuple[int, ...]) -> Tensor:
        found = (
            piece.data
            for placed in self._mine[name]
            for piece in _main_pieces(placed)
            if (piece.name, piece.offset) == (name, offset)
        )
        return next(found).contiguous()


class _Asking:
    """The source that rank 0 reads: it tells the others what comes."""

    def __init__(self, tensors: LiveTensors) -> None:
        self._tensors = tensors
        self._index = {name: index for index, name in enumerate(tensors.names())}

    def names(self) -> list[str]:
        """See TensorSource."""
        return list(self._index)

    def read(self, name: str) -> Tensor:
        """See TensorSource."""
        _asked_for(self._index[name])
        return self._tensors.read(name)


def _asked_for(index: int = STOP) -> int:
    """The index that rank 0 gives, on every rank. Collective."""
    value = torch.tensor(index, device=accelerator.device())
    torch.distributed.broadcast(value, src=0)
    return int(value)


def _placed(chunks: list[torch.nn.Module]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for chunk in chunks:
        for value in nested_values(getattr(chunk, "module", chunk).sharded_state_dict()):
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                yield value


def _main_pieces(placed: ShardedTensor | ShardedTensorFactory) -> Iterator[TensorShard]:
    """Those that a checkpoint takes from this rank; other ranks have the same of the others."""
    for part in parts_of(placed):
        if is_main_replica(part.replica_id):
            yield piece_of(part)


def _held(piece: TensorShard) -> _Held:
    size, dtype = tuple(piece.data.shape), piece.data.dtype
    return _Held(torch.distributed.get_rank(), piece.shape, piece.offset, size, dtype)

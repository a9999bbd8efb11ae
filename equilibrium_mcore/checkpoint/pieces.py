"""Whole tensors from the pieces that ranks hold, by the checkpoint's own map of the layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """A rank's part of a whole tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole
    offset: tuple[int, ...]
    data: Tensor  # with as many axes as the whole

    def copied(self) -> TensorShard:
        """The same with data of its own, on the CPU."""
        return replace(self, data=self.data.clone().cpu())


@dataclass
class FullTensor:
    """A tensor put together, and how far its replicas lie apart."""

    data: Tensor
    covered: Tensor  # how often each element was given
    disagreement: float = 0.0  # largest difference between replicas, relative to the largest value


def parts_of(placed: ShardedTensor | ShardedTensorFactory) -> Iterable[ShardedTensor]:
    """The tensors that a checkpoint holds of what a module describes as one."""
    if isinstance(placed, ShardedTensorFactory):
        for part in nested_values(placed.build()):
            yield from parts_of(part)
    else:
        yield placed


def piece_of(part: ShardedTensor) -> TensorShard:
    """The part with its place in the whole; its data is the part's own memory."""
    data = part.data.detach()
    for _ in range(part.prepend_axis_num):
        data = data.unsqueeze(0)
    return TensorShard(
        part.key.lstrip("."), tuple(part.global_shape), tuple(part.global_offset), data
    )


def whole_shard(name: str, tensor: Tensor) -> TensorShard:
    """A copy of a tensor that this rank holds whole."""
    data = tensor.detach()
    return TensorShard(name, tuple(data.shape), (0,) * data.dim(), data).copied()


def assemble(pieces: Iterable[TensorShard]) -> dict[str, FullTensor]:
    """Whole tensors by name. Raises ValueError where a part of one is missing."""
    wholes: dict[str, FullTensor] = {}
    for piece in pieces:
        if piece.name not in wholes:
            wholes[piece.name] = FullTensor(
                torch.zeros(piece.shape, dtype=piece.data.dtype),
                torch.zeros(piece.shape, dtype=torch.int16),
            )
        whole = wholes[piece.name]
        place = tuple(
            slice(start, start + size)
            for start, size in zip(piece.offset, piece.data.shape, strict=True)
        )
        seen = whole.covered[place] > 0
        if seen.any():
            apart = (whole.data[place] - piece.data).abs()[seen].max().item()
            scale = piece.data.abs().max().item() or 1.0
            whole.disagreement = max(whole.disagreement, apart / scale)
        whole.data[place] = torch.where(seen, whole.data[place], piece.data)
        whole.covered[place] += 1
    for name, whole in wholes.items():
        if not whole.covered.all():
            missing = int((whole.covered == 0).sum())
            raise ValueError(
                f"{name}: no rank holds {missing} of its {whole.covered.numel()} values"
            )
    return wholes

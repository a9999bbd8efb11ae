"""A run's gradients, updates and weights as the pieces of whole tensors."""

from __future__ import annotations

from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from torch import Tensor

from equilibrium_mcore.checkpoint.pieces import TensorShard, parts_of, piece_of
from equilibrium_mcore.training.setup import Run


def pieces_of(run: Run, tensors: dict[str, Tensor]) -> list[TensorShard]:
    """Copies of this rank's pieces of parameter-shaped `tensors`, by the optimizer's names."""
    parameters = run.optimizer.parameters
    sharded = {
        str(index): getattr(chunk, "module", chunk).sharded_state_dict()
        for index, chunk in enumerate(run.chunks)
    }
    by_index = get_param_id_to_sharded_param_map(sharded, [p.model for p in parameters])
    pieces: list[TensorShard] = []
    for index, shard in by_index.items():
        tensor = tensors.get(parameters[index].name)
        if tensor is not None:
            placed = make_sharded_optimizer_tensor(shard, tensor.detach(), prefix="")
            pieces += [piece_of(part).copied() for part in parts_of(placed)]
    return pieces

"""The optimizer's state as megatron-core sharded tensors, so that it loads in any layout.

Parameter-shaped state is saved under the parameter's own sharding, by its owner. State of a whole
part is saved once, as a whole tensor named by the parameter's layout-free name and the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from torch import Tensor

from equilibrium_mcore.optim.optimizer import HybridOptimizer
from equilibrium_mcore.optim.parameters import Parameter


def sharded_optimizer_state(optimizer: HybridOptimizer, model_sharded: dict) -> dict[str, Any]:
    """`tensors` and `wholes` by parameter name, and `common` plain values."""
    optimizer.init_state()
    parameters = optimizer.parameters
    by_id = get_param_id_to_sharded_param_map(model_sharded, [p.model for p in parameters])
    shards = {parameters[i].name: sharded for i, sharded in by_id.items()}
    tensors: dict[str, dict] = {}
    wholes: dict[str, dict] = {}
    for parameter in parameters:
        if not parameter.is_owned:
            continue
        if parameter.name not in shards:
            raise KeyError(f"{parameter.name} has no place in the model's sharded state")
        shard = _written_by_owner(shards[parameter.name])
        tensors[parameter.name] = {
            key: make_sharded_optimizer_tensor(shard, value, prefix=f"optimizer.{key}")
            for key, value in optimizer.state_of(parameter).items()
        }
        wholes[parameter.name] = {
            key: ShardedTensor.from_rank_offsets(
                f"optimizer.{key}.{parameter.name}",
                value,
                # Every tensor-parallel rank has it; the first writes it.
                replica_id=parameter.tensor_group.rank(),
            )
            for key, value in optimizer.whole_state_of(parameter).items()
        }
    return {"tensors": tensors, "wholes": wholes, "common": _common(optimizer)}


@torch.no_grad()
def load_optimizer_state(optimizer: HybridOptimizer, state: dict[str, Any]) -> None:
    """Take back what `sharded_optimizer_state` described. Collective."""
    for parameter in optimizer.parameters:
        if parameter.is_owned:
            for key, target in optimizer.state_of(parameter).items():
                target.copy_(state["tensors"][parameter.name][key])
            for key, target in optimizer.whole_state_of(parameter).items():
                target.copy_(state["wholes"][parameter.name][key])
    common = state["common"]
    optimizer.set_steps(common["steps_done"])
    if optimizer.schedule_free is not None:
        optimizer.schedule_free.weight_sum = common["average_weight_sum"]
    if optimizer.scaler is not None and common.get("scaler"):
        optimizer.scaler.load_state_dict(common["scaler"])
    if not optimizer.config.parallelism.distributed_optimizer:
        _share(optimizer)
    if optimizer.schedule_free is not None:  # the model was saved with averaged weights
        optimizer.write_training_weights()


def _common(optimizer: HybridOptimizer) -> dict[str, Any]:
    # Skipped fp16 steps do not count, so every optimizer's own counter equals steps_done.
    average = optimizer.schedule_free
    return {
        "steps_done": optimizer.steps_done,
        "average_weight_sum": average.weight_sum if average is not None else None,
        "scaler": optimizer.scaler.state_dict() if optimizer.scaler is not None else None,
    }


def _share(optimizer: HybridOptimizer) -> None:
    """Without the distributed optimizer only rank 0 of a group reads; the rest get a copy."""
    for parameter in optimizer.parameters:
        if parameter.data_group.size() > 1:
            source = torch.distributed.get_global_rank(parameter.data_group, parameter.owner)
            for tensor in _all_of(optimizer, parameter):
                torch.distributed.broadcast(tensor, source, group=parameter.data_group)


def _all_of(optimizer: HybridOptimizer, parameter: Parameter) -> Iterator[Tensor]:
    yield from optimizer.state_of(parameter).values()
    yield from optimizer.whole_state_of(parameter).values()


def _written_by_owner(shard):
    """The shard with its data-parallel replica number set to 0: its owner is what writes it."""
    replica = shard.replica_id
    return replace(shard, replica_id=0 if isinstance(replica, int) else (*replica[:-1], 0))

"""This rank's trainable parameters with all that the optimizer must know of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from equilibrium_mcore.config.schema import ModelConfig, OptimizerConfig
from equilibrium_mcore.optim.table import PartSizes, rule_for


@dataclass(eq=False)
class Parameter:
    """One parameter of this rank's model, and its place in the layout."""

    name: str  # the same in every layout, e.g. decoder.layers.3.mixer.in_proj.weight
    model: Tensor  # the model's own tensor, in the model's precision
    kind: str  # of optim.table
    parts: PartSizes | None  # of the whole matrix
    data_group: ProcessGroup  # ranks with the same values
    tensor_group: ProcessGroup  # ranks with the other slices
    partition_dim: int | None  # None where every tensor rank has the whole
    counts_in_norm: bool  # whether this copy is the one that counts
    is_expert: bool  # whether it belongs to routed experts, whose groups are others
    is_matrix: bool  # whether the matrix optimizer updates it
    owner: int = 0  # rank in data_group that keeps its main weight and optimizer state
    main: Tensor | None = None  # float32 (or float64) weight, on the owner

    @property
    def is_owned(self) -> bool:
        return self.owner == self.data_group.rank()

    @property
    def gradient(self) -> Tensor:
        """The reduced gradient that megatron-core's DDP left, in float32 or wider."""
        return self.model.main_grad

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape without tensor parallelism."""
        shape = list(self.model.shape)
        if self.partition_dim is not None:
            shape[self.partition_dim] *= self.tensor_group.size()
        return tuple(shape)


def describe_parameters(
    chunks: list[torch.nn.Module],
    groups: ProcessGroupCollection,
    *,
    model: ModelConfig,
    optimizer: OptimizerConfig,
) -> list[Parameter]:
    """All trainable parameters of this rank's model chunks, in an order that DP ranks share."""
    found = []
    for chunk in chunks:
        for name, tensor in layout_free_names(chunk):
            if tensor.requires_grad:
                found.append(_describe(name, tensor, groups, model, optimizer))
    return found


def layout_free_names(chunk: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor), with layers and experts numbered over the whole model."""
    modules = dict(chunk.named_modules())
    named = []
    for name, tensor in chunk.named_parameters():

        def layer_number(match: re.Match, name: str = name) -> str:
            module = modules[name[: match.end()]]
            return f".layers.{module.layer_number - 1}"

        def expert_number(match: re.Match, name: str = name) -> str:
            experts = modules[name[: match.start()]]
            first = experts.ep_group.rank() * experts.num_local_experts
            return f".local_experts.{first + int(match.group(1))}"

        free = re.sub(r"\.layers\.(\d+)", layer_number, name)
        if ".local_experts." in name:
            number = re.search(r"\.local_experts\.(\d+)", name)
            free = re.sub(r"\.local_experts\.\d+", expert_number(number), free)
        named.append((free.replace("module.", ""), tensor))
    return named


def _describe(
    name: str,
    tensor: Tensor,
    groups: ProcessGroupCollection,
    model: ModelConfig,
    optimizer: OptimizerConfig,
) -> Parameter:
    rule = rule_for(name)
    is_expert = not getattr(tensor, "allreduce", True)
    tensor_group = groups.expt_tp if is_expert else groups.tp
    is_split = getattr(tensor, "tensor_model_parallel", False) and tensor_group.size() > 1
    is_shared_copy = getattr(tensor, "shared", False)
    return Parameter(
        name=name,
        model=tensor,
        kind=rule.kind,
        parts=rule.parts(model) if rule.parts else None,
        data_group=groups.expt_dp if is_expert else groups.dp_cp,
        tensor_group=tensor_group,
        partition_dim=tensor.partition_dim if is_split else None,
        counts_in_norm=(is_split or tensor_group.rank() == 0) and not is_shared_copy,
        is_expert=is_expert,
        is_matrix=rule.kind == "matrix" and optimizer.matrices != "adamw",
    )

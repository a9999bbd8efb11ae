"""This rank's trainable parameters with all that the optimizer must know of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from equilibrium_mcore.config.schema import ModelConfig, OptimizerConfig
from equilibrium_mcore.optim.parts import part_shapes
from equilibrium_mcore.optim.treatment import Treatment, check_overrides_match, treatment_of

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(eq=False)
class Parameter:
    """One parameter of this rank's model, and its place in the layout."""

    name: str  # the same in every layout, e.g. decoder.layers.3.mixer.in_proj.weight
    model: Tensor  # the model's own tensor, in the model's precision
    treatment: Treatment  # what updates it, how fast, and why
    data_group: ProcessGroup  # ranks with the same values
    tensor_group: ProcessGroup  # ranks with the other slices
    partition_dim: int | None  # None where every tensor rank has the whole
    counts_in_norm: bool  # whether this copy is the one that counts
    is_expert: bool  # whether it belongs to routed experts, whose groups are others
    owner: int = 0  # rank in data_group that keeps its main weight and optimizer state
    main: Tensor | None = None  # float32 (or float64) weight that is updated, on the owner

    @property
    def kind(self) -> str:
        """What it is, by optim.table."""
        return self.treatment.kind

    @property
    def is_matrix(self) -> bool:
        """Whether an optimizer of whole matrices updates it."""
        return self.treatment.is_matrix

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

    @property
    def part_shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of the whole maps of a matrix."""
        return part_shapes(self.whole_shape, self.treatment.parts)


def describe_parameters(
    chunks: list[torch.nn.Module],
    groups: ProcessGroupCollection,
    *,
    model: ModelConfig,
    optimizer: OptimizerConfig,
) -> list[Parameter]:
    """All trainable parameters of this rank's model chunks, in an order that DP ranks share.

    Collective. Raises ConfigError where an override decides no parameter of the whole model.
    """
    found = []
    for chunk in chunks:
        for name, tensor in layout_free_names(chunk):
            if tensor.requires_grad:
                found.append(_describe(name, tensor, groups, model, optimizer))
    patterns = [override.pattern for override in optimizer.overrides]
    if patterns:
        decided = [sum(p.treatment.override == pattern for p in found) for pattern in patterns]
        counts = torch.tensor(decided, device=next(chunks[0].parameters()).device)
        torch.distributed.all_reduce(counts)
        names = [parameter.name for parameter in found]
        check_overrides_match(optimizer.overrides, counts.tolist(), names)
    return found


def layout_free_names(chunk: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor), with layers and experts numbered over the whole model.

    A grouped expert layer's `linear_fc1.weight3` has the name that it has with experts one by one.
    """
    modules = dict(chunk.named_modules())
    return [
        (_layout_free_name(name, modules).replace("module.", ""), tensor)
        for name, tensor in chunk.named_parameters()
    ]


def _layout_free_name(name: str, modules: dict[str, torch.nn.Module]) -> str:
    def layer_number(match: re.Match) -> str:
        return f".layers.{modules[name[: match.end()]].layer_number - 1}"

    free = re.sub(r"\.layers\.(\d+)", layer_number, name)
    expert = re.search(r"\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|adapter\.[AB]))$", name)
    grouped = re.search(r"\.(linear_fc[12]\.weight)(\d+)$", name)
    if expert:
        number = _first_expert(modules[name[: expert.start()]]) + int(expert.group(1))
        return _with_ending(free, expert, f".local_experts.{number}.{expert.group(2)}")
    if grouped:
        number = _first_expert(modules[name[: grouped.start()]]) + int(grouped.group(2))
        return _with_ending(free, grouped, f".local_experts.{number}.{grouped.group(1)}")
    return free


def _with_ending(free: str, old: re.Match, new: str) -> str:
    return free[: -len(old.group())] + new


def _first_expert(experts: torch.nn.Module) -> int:
    """The number, in the whole model, of the first expert on this rank."""
    if experts.num_local_experts == experts.config.num_moe_experts:
        return 0
    return experts.ep_group.rank() * experts.num_local_experts


def _describe(
    name: str,
    tensor: Tensor,
    groups: ProcessGroupCollection,
    model: ModelConfig,
    optimizer: OptimizerConfig,
) -> Parameter:
    is_expert = not getattr(tensor, "allreduce", True)
    tensor_group = groups.expt_tp if is_expert else groups.tp
    is_split = getattr(tensor, "tensor_model_parallel", False) and tensor_group.size() > 1
    is_shared_copy = getattr(tensor, "shared", False)  # of a tied table, on the last stage
    treated_as = EMBEDDING if is_shared_copy else name  # so that both stay one
    return Parameter(
        name=name,
        model=tensor,
        treatment=treatment_of(treated_as, tensor.shape, model=model, optimizer=optimizer),
        data_group=groups.expt_dp if is_expert else groups.dp_cp,
        tensor_group=tensor_group,
        partition_dim=tensor.partition_dim if is_split else None,
        counts_in_norm=(is_split or tensor_group.rank() == 0) and not is_shared_copy,
        is_expert=is_expert,
    )

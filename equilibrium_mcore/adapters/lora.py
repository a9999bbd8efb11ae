"""LoRA on the linear layers of megatron-core's modules, whatever the layout.

Source: arXiv 2106.09685. A and B are whole on every rank, and in the order of the whole weight, so
that they are drawn, saved and exported alike in every layout; a rank multiplies with its slice.
Shapes: S positions, B sequences, I inputs, O outputs, r rank; T tensor-parallel ranks.

What a rank computes of y = scale * B (A x), where it holds rows of W (column-parallel), columns of
W (row-parallel) or all of it, with sequence parallelism (SP) and without:

    column      SP: A on its positions, gather h over positions, its rows of B
                    (backward: h's gradient is reduced and scattered, those of A and B are summed)
                no: A, its rows of B  (backward: h's and B's gradients are summed)
    row         its columns of A, then h is summed, and scattered over positions under SP, all of B
                    (backward: A's gradient is summed, under SP B's too)
    duplicated  both whole  (backward: under SP both are summed)

A sum in backward is `copy_to_tensor_model_parallel_region`: identity forward, all-reduce backward.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from equilibrium_mcore.adapters.names import ADAPTER, WEIGHT
from equilibrium_mcore.adapters.targets import Linear, is_target, linears_of
from equilibrium_mcore.config.adapters import LoraConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.models.draw import named_generator
from equilibrium_mcore.optim.parts import Parts, local_slice, split_rows
from equilibrium_mcore.optim.table import rule_for


class LoraAdapter(torch.nn.Module):
    """The two factors beside one linear layer; adds to its output by a forward hook.

    Args:
        linear: what it adapts.
        parts: the maps among the weight's rows; None for one.
        settings: rank and scale.
        group: tensor-parallel ranks; None where the layer is on one (a routed expert's).
        seed: of the run; A is drawn from it and the layer's name, B is zero.
    """

    def __init__(
        self,
        linear: Linear,
        parts: Parts | None,
        settings: LoraConfig,
        group: ProcessGroup | None,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        weight = linear.module.weight
        self._linear = (linear.module,)  # in a tuple, so that it is no submodule of its own
        self.split, self.parts = linear.split, parts
        self.group = group if group is not None and group.size() > 1 else None
        self.sequence = self.group is not None and bool(linear.module.sequence_parallel)
        self.scale = settings.alpha / settings.rank
        ways = 1 if self.group is None else self.group.size()
        outputs, inputs = weight.shape
        outputs *= ways if linear.split == "column" else 1
        inputs *= ways if linear.split == "row" else 1
        a = torch.empty(settings.rank, inputs, dtype=torch.float64)
        # As torch's own linear layers: uniform within 1 / sqrt(inputs).
        a.uniform_(-1, 1, generator=named_generator(seed, linear.name)).div_(math.sqrt(inputs))
        kind = {"dtype": weight.dtype, "device": weight.device}
        self.A = torch.nn.Parameter(a.to(**kind))
        self.B = torch.nn.Parameter(torch.zeros(outputs, settings.rank, **kind))
        for factor in (self.A, self.B):
            factor.allreduce = not linear.is_expert  # megatron-core's word for "not an expert's"

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output, of the shape that this rank has of it.

        x: (S, B, I), of which I is cut on a row-parallel layer and S under SP on the others.
        """
        a, b = self.A, self.B
        if self.group is None:
            return functional.linear(functional.linear(x, a), b) * self.scale
        if self.split == "row":
            h = functional.linear(x, self._columns(self._summed(a)))
            if self.sequence:
                h = reduce_scatter_to_sequence_parallel_region(h, group=self.group)
                b = self._summed(b)
            else:
                h = reduce_from_tensor_model_parallel_region(h, group=self.group)
            return functional.linear(h, b) * self.scale
        if self.sequence:
            a = self._summed(a)
        h = functional.linear(x, a)
        if self.split == "duplicated":
            return functional.linear(h, self._summed(b) if self.sequence else b) * self.scale
        if self.sequence:
            h = gather_from_sequence_parallel_region(h, True, group=self.group)
        else:
            h = copy_to_tensor_model_parallel_region(h, group=self.group)
        return functional.linear(h, self._rows(self._summed(b))) * self.scale

    @property
    def linear(self) -> torch.nn.Module:
        """The layer that it adapts, which is no part of it."""
        return self._linear[0]

    def product_here(self, dtype: torch.dtype) -> Tensor:
        """scale * B A, of the shape and order of this rank's slice of the weight."""
        product = self.B.to(dtype) @ self.A.to(dtype) * self.scale
        if self.group is None or self.split == "duplicated":
            return product
        return self._columns(product) if self.split == "row" else self._rows(product)

    def _summed(self, factor: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(factor, group=self.group)

    def _rows(self, factor: Tensor) -> Tensor:
        """This rank's rows, as the layer's weight has them."""
        return local_slice(split_rows(factor, self.parts), self.parts, group=self.group, dim=0)

    def _columns(self, factor: Tensor) -> Tensor:
        return factor.chunk(self.group.size(), dim=1)[self.group.rank()]


def attach_adapters(
    chunk: torch.nn.Module,
    settings: LoraConfig,
    *,
    model: ModelConfig,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """Give every target of this rank's chunk an adapter that trains.

    Raises ConfigError for routed experts whose layers are multiplied at once.
    """
    if settings.experts and any("Grouped" in type(m).__name__ for m in chunk.modules()):
        raise ConfigError(
            "adapters.experts=True on Transformer Engine's grouped experts, which multiply all "
            "experts at once: set training.backend=torch, or leave the experts without adapters"
        )
    for linear in linears_of(chunk):
        if not is_target(linear.name, settings):
            continue
        rule = rule_for(linear.name + WEIGHT, model)
        parts = rule.parts(model) if rule.parts else None
        group = None if linear.is_expert else groups.tp
        adapter = LoraAdapter(linear, parts, settings, group, seed=seed)
        put_back(chunk, {linear.name: adapter})


def adapters_of(chunk: torch.nn.Module) -> dict[str, LoraAdapter]:
    """The adapters of a chunk by the layout-free names of their layers."""
    return {
        linear.name: linear.module.get_submodule(ADAPTER)
        for linear in linears_of(chunk)
        if hasattr(linear.module, ADAPTER)
    }


def detach_adapters(chunk: torch.nn.Module) -> dict[str, LoraAdapter]:
    """Take the adapters off the chunk's layers, for `put_back`."""
    taken = adapters_of(chunk)
    for adapter in taken.values():
        delattr(adapter.linear, ADAPTER)
        adapter.hook.remove()
    return taken


def put_back(chunk: torch.nn.Module, adapters: dict[str, LoraAdapter]) -> None:
    """Let adapters stand beside their layers, which are of this chunk."""
    for adapter in adapters.values():
        adapter.linear.add_module(ADAPTER, adapter)
        adapter.hook = adapter.linear.register_forward_hook(partial(_add, adapter))


def _add(adapter: LoraAdapter, module: Any, arguments: tuple, output: Any) -> Any:
    """A forward hook: megatron-core's linear layers give their output and a bias apart."""
    if not isinstance(output, tuple):
        return output + adapter(arguments[0])
    result, *others = output
    return (result + adapter(arguments[0]), *others)

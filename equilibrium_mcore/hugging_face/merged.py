"""The tensors of a model with adapters, as if their products were part of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from equilibrium_mcore.adapters.names import ADAPTER, WEIGHT
from equilibrium_mcore.config.adapters import LoraConfig
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.hugging_face.source import TensorSource
from equilibrium_mcore.optim.parts import split_rows
from equilibrium_mcore.optim.table import rule_for

FACTORS = ("A", "B")
# A checkpoint stacks routed experts under this name, where a model has them one by one.
_STACKED, _FIRST = ".experts.experts.", ".experts.local_experts.0."


class WithoutAdapters:
    """A TensorSource: the frozen weights alone."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.all_names = set(source.names())

    def names(self) -> list[str]:
        """See TensorSource."""
        return [name for name in self.source.names() if f".{ADAPTER}." not in name]

    def read(self, name: str) -> Tensor:
        """See TensorSource."""
        return self.source.read(name)

    def factors(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """A and B of a linear layer, stacked where experts are; None where it has no adapter."""
        names = [f"{layer}.{ADAPTER}.{factor}" for factor in FACTORS]
        if names[0] not in self.all_names:
            return None
        a, b = (self.source.read(name) for name in names)
        return a, b


class Merged(WithoutAdapters):
    """A TensorSource: each weight with its adapter's product, rounded once."""

    def __init__(self, source: TensorSource, settings: LoraConfig, model: ModelConfig) -> None:
        super().__init__(source)
        self.settings, self.model = settings, model

    def read(self, name: str) -> Tensor:
        """See TensorSource."""
        tensor = super().read(name)
        layer, weight, part = name.rpartition(WEIGHT)
        factors = self.factors(layer) if weight else None
        if factors is None:
            return tensor
        wide = torch.promote_types(tensor.dtype, torch.float32)
        a, b = factors[0].to(wide), rows_of(factors[1].to(wide), layer, part, self.model)
        product = b @ a * (self.settings.alpha / self.settings.rank)
        return (tensor.to(wide) + product).to(tensor.dtype)


def rows_of(factor: Tensor, layer: str, part: str, model: ModelConfig) -> Tensor:
    """The rows of B that belong to one part of a weight that is saved in parts (`.x`); or all."""
    if not part:
        return factor
    rule = rule_for(layer.replace(_STACKED, _FIRST) + WEIGHT, model)
    parts = rule.parts(model)
    return split_rows(factor, parts)[parts.names.index(part.removeprefix("."))]

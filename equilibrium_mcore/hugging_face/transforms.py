"""How a tensor changes on its way between megatron-core's layout and Hugging Face's.

A transform takes the tensors of the left side of a mapping and returns those of the right side;
`to_megatron` is its exact inverse. Shapes: H hidden, F inner width, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibrium_mcore.config.schema import ModelConfig


class Copy:
    """The tensor as it is."""

    def to_hugging_face(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        return tensors

    def to_megatron(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        return tensors


@dataclass(frozen=True)
class Join:
    """Parts one after the other along axis 0; `sizes` gives their lengths, for the way back."""

    sizes: Callable[[ModelConfig], list[int]]

    def to_hugging_face(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        return [torch.cat(tensors)]

    def to_megatron(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        return list(tensors[0].split(self.sizes(model)))


class SplitGated:
    """SwiGLU's first projection [2F, H] = [gate; up] into gate [F, H] and up [F, H]."""

    def to_hugging_face(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        return list(tensors[0].chunk(2))

    def to_megatron(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        return [torch.cat(tensors)]


class SplitQKV:
    """Attention's fused projection into queries, keys and values; a weight or a bias.

    megatron-core keeps each key/value group together: axis 0 is, group after group, the group's
    query heads, its key head and its value head, each D rows.
    """

    def to_hugging_face(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        groups, queries, width = self._shape(model)
        fused = tensors[0].unflatten(0, (groups, queries + 2, width))
        parts = fused.split([queries, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]

    def to_megatron(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        groups, _, width = self._shape(model)
        parts = [tensor.unflatten(0, (groups, -1, width)) for tensor in tensors]
        return [torch.cat(parts, dim=1).flatten(0, 2)]

    @staticmethod
    def _shape(model: ModelConfig) -> tuple[int, int, int]:
        attention = model.attention
        assert attention is not None
        groups = attention.num_query_groups
        return groups, attention.num_heads // groups, attention.head_dim


class TrimVocabulary:
    """Rows of the padded vocabulary beyond the real one are dropped; zeros on the way back."""

    def to_hugging_face(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        return [tensors[0][: model.vocab_size]]

    def to_megatron(self, tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """See the module."""
        table = tensors[0]
        padding = table.new_zeros(model.padded_vocab_size - table.shape[0], table.shape[1])
        return [torch.cat([table, padding])]

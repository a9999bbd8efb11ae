"""Where an export gets whole tensors from: a checkpoint, or the model of a run in memory."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TensorSource(Protocol):
    """The model's tensors by the names that they have in a checkpoint, whatever the layout."""

    def names(self) -> list[str]:
        """Names of the model's tensors."""

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU, in its own dtype."""

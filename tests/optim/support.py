"""Parameters without a model, for tests of single optimizers."""

from __future__ import annotations

import torch

from equilibrium_mcore.optim.parameters import Parameter
from equilibrium_mcore.optim.parts import Parts
from equilibrium_mcore.optim.treatment import Treatment


class Group:
    """A process group that is only asked for its size and rank."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


ONE_RANK = Group(1)


def matrix(tensor: torch.Tensor, config, parts: Parts | None = None) -> Parameter:
    """A whole matrix on one rank, updated as the optimizer section `config` says."""
    treatment = Treatment(
        "matrix", "muon", config.learning_rate, config.weight_decay, parts, "a test"
    )
    return Parameter(
        name="m",
        model=tensor,
        treatment=treatment,
        data_group=ONE_RANK,
        tensor_group=ONE_RANK,
        partition_dim=None,
        counts_in_norm=True,
        is_expert=False,
        main=tensor,
    )

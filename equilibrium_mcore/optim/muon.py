"""Muon on whole matrices: the update does not depend on the layout.

Source: K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon), scaling from arXiv 2502.16982.
What is orthogonalised is a matrix that acts as one linear map (`optim.table`), put together from
all tensor-parallel slices.
"""

from __future__ import annotations

import torch
from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor
from torch import Tensor

from equilibrium_mcore.config.optimizers import MuonConfig
from equilibrium_mcore.optim.matrix import MatrixOptimizer, by_part_shape
from equilibrium_mcore.optim.newton_schulz import largest_singular_value, orthogonalise
from equilibrium_mcore.optim.parameters import Parameter


class Muon(MatrixOptimizer):
    """Momentum, orthogonalised.

    Args:
        momentum: instead of the config's, where schedule-free training averages instead.
    """

    def __init__(
        self, parameters: list[Parameter], config: MuonConfig, *, momentum: float | None = None
    ) -> None:
        self.config = config
        self.momentum_decay = config.momentum if momentum is None else momentum
        super().__init__(parameters)

    def directions(self, batch: list[Tensor]) -> dict[Tensor, Tensor]:
        """Scaled orthogonal factors of momentum."""
        config, decay = self.config, self.momentum_decay
        momenta = {}
        for main in batch:
            momentum = self.renew_momentum(main)
            momenta[main] = main.grad.lerp(momentum, decay) if config.nesterov else momentum
        parts = self.gather(momenta)
        for places in by_part_shape(parts):
            orthogonal = orthogonalise(
                torch.stack([parts[main][index] for main, index in places]),
                steps=config.newton_schulz_steps,
                coefficients=config.coefficients,
                precision=config.matmul_precision,
            )
            scale = get_muon_scale_factor(*orthogonal.shape[1:], mode=config.scale)
            orthogonal = orthogonal * (scale * config.extra_scale)
            for (main, index), matrix in zip(places, orthogonal, strict=True):
                parts[main][index] = matrix
        return self.scatter(parts)


def largest(parameter: Parameter, config: MuonConfig) -> float:
    """The most that a step changes an element, at a learning rate of 1 and without decay.

    No element of a matrix is larger than its largest singular value.
    """
    scales = [get_muon_scale_factor(*s, mode=config.scale) for s in parameter.part_shapes]
    singular = largest_singular_value(config.newton_schulz_steps, config.coefficients)
    return singular * max(scales) * config.extra_scale

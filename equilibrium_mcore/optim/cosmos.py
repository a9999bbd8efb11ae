"""COSMOS on whole matrices: SOAP on the leading eigen-subspace of the columns, Muon on the rest.

Source: arXiv 2502.17410, algorithm 1. Three details are those of the authors' code
(github.com/lliu606/COSMOS): the first subspace is the gradient's own, epsilon is added outside the
root, and the last normalisation gives every element of an update, not every row, a fixed root mean
square (`update_rms` here, `lr_ratio` there).
"""

from __future__ import annotations

import torch
from torch import Tensor

from equilibrium_mcore.config.optimizers import CosmosConfig
from equilibrium_mcore.optim.eigenbasis import DAMPING, first_basis, gram
from equilibrium_mcore.optim.matrix import StatefulMatrixOptimizer, WholeState
from equilibrium_mcore.optim.newton_schulz import orthogonalise
from equilibrium_mcore.optim.parameters import Parameter


class Cosmos(StatefulMatrixOptimizer):
    """COSMOS.

    Args:
        beta1: instead of the config's, where schedule-free training averages instead.
    """

    def __init__(
        self, parameters: list[Parameter], config: CosmosConfig, *, beta1: float | None = None
    ) -> None:
        self.config = config
        self.momentum_decay = config.beta1 if beta1 is None else beta1
        super().__init__(parameters)

    def rank_of(self, rows: int, columns: int) -> int:
        """Dimensions of the leading subspace. A subspace of everything would leave no rest."""
        return min(self.config.rank, max(1, min(rows, columns) // 2))

    def new_whole_state(self, rows: int, columns: int, like: Tensor) -> WholeState:
        """Subspace U (n, r), its second-moment matrix S (r, r), second moment V (m, r)."""
        rank = self.rank_of(rows, columns)
        return {
            "subspace": torch.eye(columns, rank, dtype=like.dtype, device=like.device),
            "subspace_moment": like.new_zeros(rank, rank),
            "second_moment": like.new_zeros(rows, rank),
        }

    def directions(self, batch: list[Tensor]) -> dict[Tensor, Tensor]:
        """Both shares together, scaled to the chosen root mean square."""
        gradients = self.gather({main: main.grad for main in batch})
        momenta = self.gather({main: self.renew_momentum(main) for main in batch})
        return self.scatter(self.update_parts(gradients, momenta))

    def update_stack(self, gradient: Tensor, momentum: Tensor, state: WholeState) -> Tensor:
        """The update of a stack of matrices (B, m, n); renews `state`."""
        config = self.config
        self._renew_subspace(gradient, state)
        subspace, second = state["subspace"], state["second_moment"]
        second.lerp_((gradient @ subspace).square(), 1 - config.beta2)
        inside = momentum @ subspace
        rest = momentum - inside @ subspace.mT
        denominator = (second / (1 - config.beta2**self.steps)).sqrt_().add_(config.epsilon)
        soap = (inside / (1 - self.momentum_decay**self.steps) / denominator) @ subspace.mT
        muon = orthogonalise(
            rest,
            steps=config.newton_schulz_steps,
            coefficients=config.coefficients,
            precision=config.matmul_precision,
        )
        return unit_rms(soap + config.muon_weight * unit_rms(muon)) * config.update_rms

    def _renew_subspace(self, gradient: Tensor, state: WholeState) -> None:
        """Eigenvectors of G^T G at the first step; one power iteration and a QR later."""
        before, beta2 = state["subspace"], self.config.beta2
        moment = torch.zeros_like(state["subspace_moment"])
        if self.steps == 1:
            eigenvectors = first_basis(gram(gradient))
            subspace = eigenvectors[..., : before.size(-1)].to(before.dtype)
        else:
            moved = before @ state["subspace_moment"]
            moved = moved.lerp(gradient.mT @ (gradient @ before), 1 - beta2).double()
            # As in `eigenbasis`: a direction that no gradient has stays what it was.
            size = torch.linalg.vector_norm(moved, dim=(-2, -1), keepdim=True)
            subspace = torch.linalg.qr(moved + DAMPING * size * before).Q.to(before.dtype)
            turn = before.mT @ subspace
            moment = turn.mT @ state["subspace_moment"] @ turn
        projected = gradient @ subspace
        state["subspace"] = subspace
        state["subspace_moment"] = moment.lerp(projected.mT @ projected, 1 - beta2)


def unit_rms(stack: Tensor) -> Tensor:
    """Each matrix scaled to a root mean square of 1; zero stays zero."""
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    elements = stack.size(-2) * stack.size(-1)
    return stack * (elements**0.5 / norm.clamp_min(1e-30))


def largest(parameter: Parameter, config: CosmosConfig) -> float:
    """The most that a step changes an element, at a learning rate of 1 and without decay.

    An update has a fixed root mean square, which a single element could have to itself.
    """
    return config.update_rms * max(rows * columns for rows, columns in parameter.part_shapes) ** 0.5

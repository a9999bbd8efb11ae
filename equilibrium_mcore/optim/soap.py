"""SOAP on whole matrices: Adam in the eigenbasis of Shampoo's preconditioner.

Source: arXiv 2409.11321, algorithm 3; the first step, as in the authors' code
(github.com/nikhilvyas/SOAP), only sets up the bases from its gradient and moves no weight. (In its
own singular basis a gradient is diagonal; Adam would blow the rounding beside the diagonal up to
full updates.) Preconditioners belong to a whole map, not to a tensor-parallel slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equilibrium_mcore.config.optimizers import SoapConfig
from equilibrium_mcore.optim.eigenbasis import first_basis, gram, renewed_basis
from equilibrium_mcore.optim.matrix import StatefulMatrixOptimizer, WholeState
from equilibrium_mcore.optim.parameters import Parameter

SIDES = ("left", "right")  # of the rows, of the columns


class Soap(StatefulMatrixOptimizer):
    """SOAP; `momentum` stays in the parameter's own coordinates, the second moment is rotated.

    Args:
        beta1: instead of the config's, where schedule-free training averages instead.
    """

    def __init__(
        self, parameters: list[Parameter], config: SoapConfig, *, beta1: float | None = None
    ) -> None:
        self.config = config
        self.momentum_decay = config.beta1 if beta1 is None else beta1
        super().__init__(parameters)

    def new_whole_state(self, rows: int, columns: int, like: Tensor) -> WholeState:
        """Second moment in the eigenbasis; preconditioner and basis of each side."""
        state = {"second_moment": like.new_zeros(rows, columns)}
        for side, size in zip(SIDES, (rows, columns), strict=True):
            if size <= self.config.max_dimension:
                state[f"{side}_preconditioner"] = like.new_zeros(size, size)
                state[f"{side}_basis"] = torch.eye(size, dtype=like.dtype, device=like.device)
        return state

    def directions(self, batch: list[Tensor]) -> dict[Tensor, Tensor]:
        """Adam's direction in the eigenbasis, rotated back."""
        gradients = self.gather({main: main.grad for main in batch})
        momenta = gradients
        if self.steps > 1:  # the first step only makes the bases
            momenta = self.gather({main: self.renew_momentum(main) for main in batch})
        return self.scatter(self.update_parts(gradients, momenta))

    def update_stack(self, gradient: Tensor, momentum: Tensor, state: WholeState) -> Tensor:
        """The update of a stack of matrices (B, m, n); renews `state`."""
        config, adam_steps = self.config, self.steps - 1
        update = torch.zeros_like(gradient)
        if adam_steps > 0:
            second = state["second_moment"]
            rotated = rotate(gradient, state)
            second.lerp_(rotated.square(), 1 - config.beta2)
            first = rotate(momentum, state) / (1 - self.momentum_decay**adam_steps)
            denominator = (second / (1 - config.beta2**adam_steps)).sqrt_().add_(config.epsilon)
            update = rotate_back(first / denominator, state)
        for side, columns in zip(SIDES, (gradient.mT, gradient), strict=True):
            if f"{side}_basis" in state:
                preconditioner = state[f"{side}_preconditioner"]
                preconditioner.lerp_(columns.mT @ columns, 1 - config.preconditioner_beta)
                self._renew_basis(side, columns, state)
        return update

    def _renew_basis(self, side: str, columns: Tensor, state: WholeState) -> None:
        """Eigenvectors at the first step; one power iteration and a QR at intervals later."""
        preconditioner, basis = state[f"{side}_preconditioner"], state[f"{side}_basis"]
        if self.steps == 1:
            state[f"{side}_basis"] = first_basis(gram(columns)).to(basis.dtype)
        elif (self.steps - 1) % self.config.basis_interval_steps == 0:
            # Largest first, so that QR keeps what is certain; the second moment moves along.
            eigenvalues = (basis * (preconditioner @ basis)).sum(dim=-2)
            order = eigenvalues.argsort(dim=-1, descending=True, stable=True)
            basis = basis.take_along_dim(order.unsqueeze(-2), dim=-1)
            state[f"{side}_basis"] = renewed_basis(preconditioner, basis)
            along = order.unsqueeze(-1 if side == "left" else -2)
            dim = -2 if side == "left" else -1
            state["second_moment"] = state["second_moment"].take_along_dim(along, dim=dim)


def rotate(matrix: Tensor, state: WholeState) -> Tensor:
    """Into the eigenbasis, on the sides that have one."""
    if "left_basis" in state:
        matrix = state["left_basis"].mT @ matrix
    return matrix @ state["right_basis"] if "right_basis" in state else matrix


def rotate_back(matrix: Tensor, state: WholeState) -> Tensor:
    """The inverse of `rotate`."""
    if "left_basis" in state:
        matrix = state["left_basis"] @ matrix
    return matrix @ state["right_basis"].mT if "right_basis" in state else matrix

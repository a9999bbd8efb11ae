"""Eigenbases that rounding does not decide.

A gradient of fewer rows than columns leaves directions empty, and there any basis is as good as
another: rounding would choose, another one in every layout, and Adam in another basis is another
update. Two small terms settle it: a graded diagonal for the first basis, which turns only
eigenvectors whose eigenvalues lie closer together than it is large, and a multiple of the identity
when a basis is renewed, which turns none. Both are relative to the mean eigenvalue; the work is
done in float64.
"""

from __future__ import annotations

import torch
from emerging_optimizers.utils.eig import eigh_with_fallback, orthogonal_iteration
from torch import Tensor

TIE_BREAK = 1e-3
DAMPING = 1e-5


def gram(stack: Tensor) -> Tensor:
    """G^T G of each matrix (B, m, n) in float64: (B, n, n)."""
    stack = stack.double()
    return stack.mT @ stack


def first_basis(moment: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices (B, n, n) in float64, largest eigenvalue first."""
    size = moment.size(-1)
    graded = torch.linspace(1, 0, size, dtype=moment.dtype, device=moment.device)
    tie_break = torch.diag_embed(TIE_BREAK * _mean_eigenvalue(moment) * graded)
    return eigh_with_fallback(moment + tie_break)[1]


def renewed_basis(moment: Tensor, basis: Tensor) -> Tensor:
    """One power iteration of `basis`, largest first, and a QR; in the basis's own precision."""
    wide = moment.double()
    damped = wide + torch.diag_embed(DAMPING * _mean_eigenvalue(wide).expand(*wide.shape[:-1]))
    return orthogonal_iteration(damped, basis.double(), 1).to(basis.dtype)


def _mean_eigenvalue(moment: Tensor) -> Tensor:
    """(B, 1); 1 for a zero matrix, whose every basis is one."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, mean, torch.ones_like(mean))

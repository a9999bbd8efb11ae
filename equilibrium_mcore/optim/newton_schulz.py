"""Orthogonalisation of stacks of matrices, in float32 by emerging-optimizers and in float64 here.

emerging-optimizers takes float32 only. Float64 runs the same iteration with the same coefficients:
it exists so that a proof of layout invariance can be sharper than float32's rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
from emerging_optimizers.orthogonalized_optimizers import muon_utils
from torch import Tensor

# Coefficient sets that stay at their last triple after the end; the others start again.
_REPEAT_LAST = ("polar_express", "cans")


def orthogonalise(stack: Tensor, *, steps: int, coefficients: str, precision: str) -> Tensor:
    """Nearly orthogonal factors: singular vectors kept, singular values brought near 1.

    Args:
        stack: (matrices, rows, columns), float32 or float64; a zero matrix stays zero.
        coefficients: a coefficient set of emerging-optimizers.
        precision: of float32 products: highest, high or medium (bfloat16).
    """
    if stack.dtype == torch.float64:
        return _in_float64(stack, steps, coefficients)
    with _matmul_precision(precision):
        return muon_utils.newton_schulz(stack, steps, coefficient_type=coefficients)


def coefficient_triples(steps: int, coefficients: str) -> list[tuple[float, float, float]]:
    """(a, b, c) of every step of x <- a x + (b A + c A^2) x with A = x x^T."""
    mode = "repeat_last" if coefficients in _REPEAT_LAST else "cycle"
    known = muon_utils._COEFFICIENT_SETS[coefficients]
    return list(muon_utils.get_coefficient_iterator(steps, known, mode=mode))


@cache
def largest_singular_value(steps: int, coefficients: str) -> float:
    """The largest singular value that `orthogonalise` can leave, without rounding.

    The iteration begins at a matrix of norm 1 and acts on each singular value alone.
    """
    value = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for a, b, c in coefficient_triples(steps, coefficients):
        value = a * value + b * value**3 + c * value**5
    return value.abs().max().item()


def _in_float64(stack: Tensor, steps: int, coefficients: str) -> Tensor:
    is_tall = stack.size(-2) > stack.size(-1)
    x = stack.mT if is_tall else stack
    x = torch.nn.functional.normalize(x, p=2, dim=(-2, -1), eps=1e-7)
    for a, b, c in coefficient_triples(steps, coefficients):
        x = muon_utils.batched_newton_schulz_step(x, a, b, c)
    return x.mT if is_tall else x


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

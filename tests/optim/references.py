"""Each optimizer on one matrix, written from its paper in float64: what the package must equal."""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
SIMPLE = [(3.4445, -4.7750, 2.0315)] * 5


def newton_schulz(x: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """x <- a x + b (x x^T) x + c (x x^T)^2 x, on the side with fewer rows."""
    wide = x.shape[0] <= x.shape[1]
    x = x / x.norm()
    x = x if wide else x.T
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon:
    """kellerjordan.github.io/posts/muon, with the averaging momentum and decay of 2502.16982."""

    def __init__(self, weight: Tensor, config) -> None:
        self.w, self.c, self.m = weight.double().clone(), config, torch.zeros_like(weight).double()

    def step(self, g: Tensor) -> None:
        c, mu = self.c, self.c.momentum
        self.m = mu * self.m + (1 - mu) * g
        direction = mu * self.m + (1 - mu) * g if c.nesterov else self.m
        x = newton_schulz(direction, QUINTIC) * max(direction.shape) ** 0.5 * c.extra_scale
        self.w = self.w * (1 - c.learning_rate * c.weight_decay) - c.learning_rate * x


def mean_eigenvalue(gram: Tensor) -> Tensor:
    return gram.diagonal().mean()


def eigenvectors(gram: Tensor) -> Tensor:
    """Largest first. The graded diagonal chooses a basis where the gradient is zero (see
    equilibrium_mcore/optim/eigenbasis.py): the papers leave that to rounding."""
    graded = torch.diag(torch.linspace(1, 0, len(gram), dtype=torch.float64))
    return torch.linalg.eigh(gram + 1e-3 * mean_eigenvalue(gram) * graded).eigenvectors.flip(1)


class Soap:
    """arXiv 2409.11321, algorithm 3, with Adam's bias corrections; step 1 only makes the bases."""

    def __init__(self, weight: Tensor, config) -> None:
        m, n = weight.shape
        self.w, self.c, self.t = weight.double().clone(), config, 0
        self.m, self.v = torch.zeros(m, n).double(), torch.zeros(m, n).double()
        self.l, self.r = torch.zeros(m, m).double(), torch.zeros(n, n).double()

    def step(self, g: Tensor) -> None:
        c = self.c
        self.w = self.w * (1 - c.learning_rate * c.weight_decay)
        if self.t > 0:
            rotated = self.ql.T @ g @ self.qr
            self.m = c.beta1 * self.m + (1 - c.beta1) * g
            self.v = c.beta2 * self.v + (1 - c.beta2) * rotated**2
            m_hat = self.ql.T @ self.m @ self.qr / (1 - c.beta1**self.t)
            v_hat = self.v / (1 - c.beta2**self.t)
            n = m_hat / (v_hat.sqrt() + c.epsilon)
            self.w = self.w - c.learning_rate * self.ql @ n @ self.qr.T
        beta = c.preconditioner_beta
        self.l = beta * self.l + (1 - beta) * g @ g.T
        self.r = beta * self.r + (1 - beta) * g.T @ g
        if self.t == 0:
            self.ql, self.qr = eigenvectors(g @ g.T), eigenvectors(g.T @ g)
        elif self.t % c.basis_interval_steps == 0:
            rows = torch.diag(self.ql.T @ self.l @ self.ql).argsort(descending=True)
            columns = torch.diag(self.qr.T @ self.r @ self.qr).argsort(descending=True)
            self.ql = self.power_iteration(self.l, self.ql[:, rows])
            self.qr = self.power_iteration(self.r, self.qr[:, columns])
            self.v = self.v[rows][:, columns]
        self.t += 1

    @staticmethod
    def power_iteration(gram: Tensor, basis: Tensor) -> Tensor:
        damping = 1e-5 * mean_eigenvalue(gram) * torch.eye(len(gram)).double()
        return torch.linalg.qr((gram + damping) @ basis).Q


class Cosmos:
    """arXiv 2502.17410, algorithm 1, with the first subspace and the scale of the authors' code."""

    def __init__(self, weight: Tensor, config) -> None:
        self.w, self.c, self.t = weight.double().clone(), config, 0
        self.m = torch.zeros_like(self.w)
        self.rank = min(config.rank, max(1, min(weight.shape) // 2))
        self.v = torch.zeros(weight.shape[0], self.rank).double()

    def step(self, g: Tensor) -> None:
        c = self.c
        self.t += 1
        self.m = c.beta1 * self.m + (1 - c.beta1) * g
        if self.t == 1:
            self.u = eigenvectors(g.T @ g)[:, : self.rank]
            self.s = (1 - c.beta2) * self.u.T @ g.T @ g @ self.u
        else:
            old, s = self.u, self.s
            power = c.beta2 * old @ s + (1 - c.beta2) * g.T @ g @ old
            self.u = torch.linalg.qr(power + 1e-5 * power.norm() * old).Q
            gram = c.beta2 * old @ s @ old.T + (1 - c.beta2) * g.T @ g
            self.s = self.u.T @ gram @ self.u
        self.v = c.beta2 * self.v + (1 - c.beta2) * (g @ self.u) ** 2
        first = self.m @ self.u / (1 - c.beta1**self.t)
        second = (self.v / (1 - c.beta2**self.t)).sqrt() + c.epsilon
        leading = first / second @ self.u.T
        rest = newton_schulz(self.m - self.m @ self.u @ self.u.T, SIMPLE)
        scale = g.numel() ** 0.5
        both = leading + c.muon_weight * scale * rest / rest.norm()
        self.w = self.w * (1 - c.learning_rate * c.weight_decay)
        self.w = self.w - c.learning_rate * c.update_rms * scale * both / both.norm()


class ScheduleFree:
    """arXiv 2405.15682, algorithm 1, around an inner step; the bias correction of the second moment
    divides it, as in the authors' library since 1.3, and does not scale the rate."""

    def __init__(self, weight: Tensor, beta: float) -> None:
        self.x = weight.double().clone()
        self.z, self.beta, self.weight_sum = self.x.clone(), beta, 0.0

    @property
    def y(self) -> Tensor:
        return (1 - self.beta) * self.z + self.beta * self.x

    def step(self, direction: Tensor, rate: float, weight_decay: float) -> None:
        """`direction` is what the inner optimizer makes of the gradient at y."""
        self.z = self.z - rate * direction - rate * weight_decay * self.y
        self.weight_sum += rate**2
        share = rate**2 / self.weight_sum
        self.x = (1 - share) * self.x + share * self.z

"""torch's AdamW with what all optimizers here have: state made in advance, and a counter to set."""

from __future__ import annotations

import math

import torch

from equilibrium_mcore.config.optimizers import AdamWConfig
from equilibrium_mcore.optim.matrix import rate_groups
from equilibrium_mcore.optim.parameters import Parameter


class AdamW(torch.optim.AdamW):
    """AdamW, each parameter at its own rate and decay.

    torch counts steps in the state of every parameter.
    """

    def __init__(self, parameters: list[Parameter], config: AdamWConfig) -> None:
        self._steps = 0  # of parameters that have no state yet
        groups, betas = rate_groups(parameters), (config.beta1, config.beta2)
        super().__init__(groups, betas=betas, eps=config.epsilon)

    def set_steps(self, steps: int) -> None:
        """Count on from so many steps."""
        self._steps = steps
        for values in self.state.values():
            values["step"].fill_(steps)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of every parameter, so that it can be saved or loaded."""
        for group in self.param_groups:
            for main in group["params"]:
                if not self.state[main]:
                    self.state[main] = {
                        "step": torch.tensor(float(self._steps)),
                        "exp_avg": torch.zeros_like(main),
                        "exp_avg_sq": torch.zeros_like(main),
                    }


def largest(config: AdamWConfig, step: int) -> float:
    """The most that a step changes an element, at a learning rate of 1 and without decay.

    By Cauchy and Schwarz: a momentum is the sum of (1 - beta1) beta1^i g_i, a second moment that of
    (1 - beta2) beta2^i g_i^2, over the same `step` gradients; epsilon only makes it less.
    """
    beta1, beta2 = config.beta1, config.beta2
    ratio = beta1**2 / beta2
    total = float(step) if ratio == 1 else (1 - ratio**step) / (1 - ratio)
    momentum = (1 - beta1) / (1 - beta1**step)
    return momentum * math.sqrt(total * (1 - beta2**step) / (1 - beta2))

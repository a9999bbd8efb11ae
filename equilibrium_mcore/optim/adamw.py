"""torch's AdamW with what all optimizers here have: state made in advance, and a counter to set."""

from __future__ import annotations

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

"""Schedule-free training: a fast iterate, its average, and a point between them.

Source: arXiv 2405.15682, algorithm 1, with any inner optimizer as in the authors' wrapper
(github.com/facebookresearch/schedule_free). Gradients are taken at y = beta x + (1 - beta) z; the
inner optimizer moves z; x averages z with weights of the squared learning rate. x is what is
evaluated and saved as the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equilibrium_mcore.config.optimizers import AdamWConfig, ScheduleFreeConfig
from equilibrium_mcore.optim.matrix import rate_groups
from equilibrium_mcore.optim.parameters import Parameter


class ScheduleFree:
    """The averages of the weights `z` that an inner optimizer moves (each parameter's `main`)."""

    def __init__(self, parameters: list[Parameter], config: ScheduleFreeConfig) -> None:
        self.config = config
        self.parameters = parameters
        self.averages = {p.main: p.main.detach().clone() for p in parameters}
        self.weight_sum = 0.0

    def training_weights(self, parameter: Parameter) -> Tensor:
        """y: where the next gradient is taken. The same bits for the same x and z."""
        return torch.lerp(parameter.main, self.averages[parameter.main], self.config.beta)

    def average(self, parameter: Parameter) -> Tensor:
        """x: what is evaluated and saved."""
        return self.averages[parameter.main]

    @torch.no_grad()
    def decay(self, groups: list[dict]) -> None:
        """Move z against y: decoupled weight decay, at the point where the gradient was taken."""
        for group in groups:
            if group["outer_weight_decay"]:
                for main in group["params"]:
                    point = torch.lerp(main, self.averages[main], self.config.beta)
                    main.sub_(point, alpha=group["lr"] * group["outer_weight_decay"])

    @torch.no_grad()
    def update_average(self, rate: float) -> None:
        """Average the new z in, weighted by the square of `rate` (a factor on every peak)."""
        self.weight_sum += rate**2
        share = rate**2 / self.weight_sum
        for main, average in self.averages.items():
            average.lerp_(main, share)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past: x = z."""
        self.weight_sum = 0.0
        for main, average in self.averages.items():
            average.copy_(main)


class AdamWithoutMomentum(torch.optim.Optimizer):
    """The inner step of schedule-free AdamW: the gradient over the root of its second moment.

    Weight decay is the outer's business.
    """

    def __init__(self, parameters: list[Parameter], config: AdamWConfig) -> None:
        self.config = config
        self.steps = 0
        super().__init__(rate_groups(parameters), defaults={"lr": 0.0, "weight_decay": 0.0})

    def set_steps(self, steps: int) -> None:
        """Count on from so many steps."""
        self.steps = steps

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of every parameter, so that it can be saved or loaded."""
        for group in self.param_groups:
            for main in group["params"]:
                if "exp_avg_sq" not in self.state[main]:
                    self.state[main]["exp_avg_sq"] = torch.zeros_like(main)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter."""
        self.init_state()
        self.steps += 1
        correction = 1 - self.config.beta2**self.steps
        for group in self.param_groups:
            for main in group["params"]:
                second = self.state[main]["exp_avg_sq"]
                second.lerp_(main.grad.square(), 1 - self.config.beta2)
                denominator = (second / correction).sqrt_().add_(self.config.epsilon)
                main.addcdiv_(main.grad, denominator, value=-group["lr"])

"""Whether a step changed a weight by more than its optimizer can, whatever the gradients were.

Damaged optimizer state, or a kernel that goes wrong, moves an owner's weight, and the exchange
gives it to all replicas alike: nothing differs afterwards. But each optimizer has a largest update,
and the weight before it is still there: in the model, until the owner's is copied over it. Where
the owner updates the model's own weight (fp32), the other ranks have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equilibrium_mcore.config.optimizers import OptimizerConfig
from equilibrium_mcore.optim.build import BUILDS
from equilibrium_mcore.optim.parameters import Parameter
from equilibrium_mcore.optim.replicas import raise_everywhere

# Times the largest: resumed with other betas, state of the old ones may exceed the new limit.
SLACK = 10.0
ELEMENTS = 16 * 2**20  # compared at once: bounds the memory


class UpdateLimit:
    """Sees the changes of one step.

    Args:
        rate: factor of the schedule on every peak learning rate.
        step: the step's number, from 1.
    """

    def __init__(self, settings: OptimizerConfig, *, rate: float, step: int) -> None:
        self.settings, self.rate, self.step = settings, rate, step
        self._seen: list[tuple[Parameter, float]] = []
        self._changes: list[Tensor] = []  # the largest, and whether any is too large

    def limit(self, parameter: Parameter) -> float:
        """The most that an element may change, decay and rounding apart."""
        treatment = parameter.treatment
        largest = BUILDS[treatment.optimizer].largest(parameter, self.settings, self.step)
        return SLACK * self.rate * treatment.learning_rate * largest

    @torch.no_grad()
    def see(self, parameter: Parameter, before: Tensor, after: Tensor) -> None:
        """Compare elements before and after, flat; what is found is kept for `check`."""
        treatment, limit = parameter.treatment, self.limit(parameter)
        kept = torch.finfo(before.dtype)
        decay = SLACK * self.rate * treatment.learning_rate * treatment.weight_decay
        relative = decay + kept.eps + 2 * torch.finfo(after.dtype).eps
        for old, new in zip(before.split(ELEMENTS), after.split(ELEMENTS), strict=True):
            wide = old.to(torch.promote_types(old.dtype, torch.float32))
            change = (new - wide).abs_()
            allowed = wide.abs_().mul_(relative).add_(limit + kept.smallest_normal * kept.eps)
            sound = (change <= allowed).all()  # false for NaN too
            self._changes.append(torch.stack([change.max().double(), (~sound).double()]))
            self._seen.append((parameter, limit))

    def see_copy(self, parameter: Parameter, before: Tensor, after: Tensor) -> None:
        """As `see`, of a copy that comes from the owner; those that the owner sees are left out."""
        if before.dtype in (torch.float32, torch.float64):
            self.see(parameter, before, after)

    def check(self, device: torch.device) -> None:
        """Raise ReplicaError on every rank if anything changed too much anywhere. Collective."""
        found = torch.stack(self._changes).tolist() if self._changes else []
        wrong = [
            f"{parameter.name} of rank {_owner(parameter)} by {change:.3g}, where "
            f"{parameter.treatment.optimizer} changes at most {limit / SLACK:.3g}"
            for (parameter, limit), (change, exceeds) in zip(self._seen, found, strict=True)
            if exceeds
        ]
        raise_everywhere(
            wrong,
            device,
            lambda said: (
                f"step {self.step}: an element changed by more than its optimizer can change it: "
                f"{said}. The optimizer's state or memory of that rank is damaged. Nothing of this "
                "step was saved: resume from the latest checkpoint, without that host if it "
                "happens again (training.compare_replicas: false turns this off)"
            ),
        )


def _owner(parameter: Parameter) -> int:
    """Rank, in the whole job, that made the update."""
    if parameter.main is not None:
        return torch.distributed.get_rank()
    return torch.distributed.get_global_rank(parameter.data_group, parameter.owner)

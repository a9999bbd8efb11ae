"""What all optimizers of whole matrices share: batches, parts over tensor ranks, and their state.

Two kinds of state. Tensors of the parameter's shape (`momentum`) lie and are saved like the
parameter. Tensors of a whole part (a preconditioner, an eigenbasis) are the same on all
tensor-parallel ranks of the parameter, and are saved once under its layout-free name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.optim.parameters import Parameter
from equilibrium_mcore.optim.parts import local_slice, whole_parts

# Elements that are treated at once. All of a 3B model's experts in one batch would need more
# memory than its weights.
BATCH_ELEMENTS = 128 * 2**20

WholeState = dict[str, Tensor]  # of one part


def rate_groups(parameters: Iterable[Parameter]) -> list[dict[str, Any]]:
    """torch's parameter groups: one for each learning rate and weight decay.

    Sorted, because tensor-parallel ranks must gather in the same order.
    """
    by_rate: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for p in parameters:
        by_rate[p.treatment.learning_rate, p.treatment.weight_decay].append(p.main)
    return [
        {"params": by_rate[key], "lr": key[0], "peak_lr": key[0], "weight_decay": key[1]}
        for key in sorted(by_rate)
    ]


class MatrixOptimizer(torch.optim.Optimizer, ABC):
    """Updates matrices that this rank owns, in place, from their `grad`; decoupled weight decay.

    All tensor-parallel ranks of a matrix must step together.

    Args:
        parameters: each with its `main` weight, float32 or float64.
    """

    momentum_decay: float  # of the state `momentum`

    def __init__(self, parameters: list[Parameter]) -> None:
        self._info = {parameter.main: parameter for parameter in parameters}
        self.whole_state: dict[Tensor, list[WholeState]] = {}
        self.steps = 0
        super().__init__(rate_groups(parameters), defaults={"lr": 0.0, "weight_decay": 0.0})

    # What a kind of optimizer has to say ------------------------------------------------------

    def new_whole_state(self, rows: int, columns: int, like: Tensor) -> WholeState:
        """State of one part before the first step; none by default."""
        return {}

    @abstractmethod
    def directions(self, batch: list[Tensor]) -> dict[Tensor, Tensor]:
        """This rank's slices of what is subtracted, times the learning rate, from each weight."""

    # --------------------------------------------------------------------------------------------

    def set_steps(self, steps: int) -> None:
        """Count on from so many steps."""
        self.steps = steps

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of every parameter, so that it can be saved or loaded."""
        for group in self.param_groups:
            for main in group["params"]:
                if main in self.whole_state:
                    continue
                if self.momentum_decay > 0:
                    self.state[main]["momentum"] = torch.zeros_like(main)
                self.whole_state[main] = [
                    self.new_whole_state(*shape, like=main)
                    for shape in self._info[main].part_shapes
                ]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every owned matrix."""
        self.init_state()
        self.steps += 1
        for group in self.param_groups:
            for batch in self._batches(group["params"]):
                for main, direction in self.directions(batch).items():
                    main.mul_(1 - group["lr"] * group["weight_decay"])
                    main.add_(direction.to(main.dtype), alpha=-group["lr"])

    def renew_momentum(self, main: Tensor) -> Tensor:
        """The momentum with the new gradient in it; the gradient itself where none is kept."""
        if self.momentum_decay == 0:
            return main.grad
        return self.state[main]["momentum"].lerp_(main.grad, 1 - self.momentum_decay)

    def part_names(self, main: Tensor) -> tuple[str, ...]:
        """Names of the parts, for keys of saved state."""
        parts = self._info[main].treatment.parts
        return parts.names if parts else ("all",)

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters of one shape together, up to BATCH_ELEMENTS of them (at least one parameter).

        Dense ones first: tensor-parallel ranks own the same dense parameters, but not always the
        same experts, and must gather in the same order.
        """
        by_shape: dict[tuple[bool, torch.Size], list[Tensor]] = defaultdict(list)
        for main in parameters:
            by_shape[self._info[main].is_expert, main.shape].append(main)
        for key in sorted(by_shape, key=lambda key: key[0]):
            members, count = by_shape[key], max(1, BATCH_ELEMENTS // key[1].numel())
            for start in range(0, len(members), count):
                yield members[start : start + count]

    def gather(self, tensors: dict[Tensor, Tensor]) -> dict[Tensor, list[Tensor]]:
        """Whole parts of each parameter's tensor. Collective over tensor ranks."""
        return {
            main: whole_parts(tensor, info.treatment.parts, **_split(info))
            for main, tensor in tensors.items()
            for info in (self._info[main],)
        }

    def scatter(self, wholes: dict[Tensor, list[Tensor]]) -> dict[Tensor, Tensor]:
        """This rank's slices again."""
        return {
            main: local_slice(parts, info.treatment.parts, **_split(info))
            for main, parts in wholes.items()
            for info in (self._info[main],)
        }


class StatefulMatrixOptimizer(MatrixOptimizer):
    """A matrix optimizer whose whole parts have state of their own, stacked for the update."""

    @abstractmethod
    def update_stack(self, gradient: Tensor, momentum: Tensor, state: WholeState) -> Tensor:
        """Directions of a stack of parts (B, m, n) of one shape; renews their stacked `state`."""

    def update_parts(
        self, gradients: dict[Tensor, list[Tensor]], momenta: dict[Tensor, list[Tensor]]
    ) -> dict[Tensor, list[Tensor]]:
        """`update_stack` of all parts, those of one shape together."""
        updates = {main: list(parts) for main, parts in gradients.items()}
        for places in by_part_shape(gradients):
            states = [self.whole_state[main][index] for main, index in places]
            stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
            update = self.update_stack(
                torch.stack([gradients[main][index] for main, index in places]),
                torch.stack([momenta[main][index] for main, index in places]),
                stacked,
            )
            for number, (main, index) in enumerate(places):
                updates[main][index] = update[number]
                for key, value in stacked.items():
                    states[number][key].copy_(value[number])
        return updates


def by_part_shape(wholes: dict[Tensor, list[Tensor]]) -> list[list[tuple[Tensor, int]]]:
    """(parameter, number of the part) of all parts, those of one shape together."""
    places: dict[tuple[int, ...], list[tuple[Tensor, int]]] = defaultdict(list)
    for main, parts in wholes.items():
        for index, part in enumerate(parts):
            places[tuple(part.shape)].append((main, index))
    return list(places.values())


def _split(parameter: Parameter) -> dict[str, Any]:
    return {"group": parameter.tensor_group, "dim": parameter.partition_dim}

"""Who keeps which parameter's main weight and state.

Layer-wise: a parameter is never cut, so that its owner can orthogonalise it. Within each group of
ranks that hold the same values, the most expensive parameters go first, to the least-loaded rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch.distributed import ProcessGroup

from equilibrium_mcore.optim.parameters import Parameter


def assign_owners(parameters: list[Parameter], *, distributed: bool) -> None:
    """Set `owner` of every parameter: rank 0 of its data group, or spread by work.

    Collective over the groups of experts, if there are any: ranks that have much to do for dense
    parameters get fewer experts.
    """
    for parameter in parameters:
        parameter.owner = 0
    if not distributed:
        return
    own_load = 0.0
    for is_expert in (False, True):
        by_group: dict[ProcessGroup, list[Parameter]] = defaultdict(list)
        for parameter in parameters:
            if parameter.is_expert == is_expert:
                by_group[parameter.data_group].append(parameter)
        for group, members in by_group.items():
            members.sort(key=work, reverse=True)  # stable: ranks agree on ties
            loads = [0.0] * group.size()
            if is_expert:
                loads = _loads_of(group, members[0], own_load)
            owners = spread([work(parameter) for parameter in members], loads)
            for parameter, owner in zip(members, owners, strict=True):
                parameter.owner = owner
            own_load += loads[group.rank()]


def spread(works: Sequence[float], loads: list[float]) -> list[int]:
    """Give each piece of work, largest first, to the least loaded; `loads` grow along."""
    owners = []
    for piece in works:
        owners.append(loads.index(min(loads)))
        loads[owners[-1]] += piece
    return owners


def _loads_of(group: ProcessGroup, expert: Parameter, own_load: float) -> list[float]:
    """What the ranks of an expert's data group have to do already. Collective."""
    if group.size() == 1:
        return [own_load]
    device = expert.model.device
    mine = torch.tensor([own_load], dtype=torch.float64, device=device)
    # Ranks that hold slices of one expert must choose the same owner for it.
    torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, group=expert.tensor_group)
    everyone = torch.empty(group.size(), dtype=torch.float64, device=device)
    torch.distributed.all_gather_into_tensor(everyone, mine, group=group)
    return everyone.tolist()


def work(parameter: Parameter) -> float:
    """Relative cost of one update: elements moved, and Newton-Schulz products for matrices."""
    elements = float(parameter.model.numel())
    if not parameter.is_matrix:
        return elements
    return elements + newton_schulz_operations(parameter.part_shapes) / 1000


def newton_schulz_operations(shapes: Iterable[tuple[int, int]], steps: int = 5) -> float:
    """Floating-point operations of the iteration on matrices of these (rows, columns).

    One step of m <= n: x x^T, its square, and their product with x. An element moved costs as much
    as about 1,000 of these operations.
    """
    total = 0.0
    for shape in shapes:
        small, large = sorted(shape)
        total += steps * (4 * small**2 * large + 2 * small**3)
    return total

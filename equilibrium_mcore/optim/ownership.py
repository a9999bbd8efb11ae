"""Who keeps which parameter's main weight and state, and how updates reach the others.

Layer-wise: a parameter is never cut, so that its owner can orthogonalise it. Within each group of
ranks that hold the same values, the dearest parameters go first to the rank with the least work.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.distributed import ProcessGroup

from equilibrium_mcore.optim.parameters import Parameter

# Elements that one rank sends per all-gather: bounds the memory of the exchange.
EXCHANGE_ELEMENTS = 64 * 2**20


def assign_owners(parameters: list[Parameter], *, distributed: bool) -> None:
    """Set `owner` of every parameter: rank 0 of its data group, or spread by work."""
    load: dict[ProcessGroup, list[float]] = {}
    for parameter in sorted(parameters, key=work, reverse=True):  # stable: ranks agree on ties
        size = parameter.data_group.size()
        ranks = load.setdefault(parameter.data_group, [0.0] * size)
        parameter.owner = ranks.index(min(ranks)) if distributed else 0
        ranks[parameter.owner] += work(parameter)


def work(parameter: Parameter) -> float:
    """Relative cost of one update: elements moved, and Newton-Schulz products for matrices."""
    elements = float(parameter.model.numel())
    if not parameter.is_matrix:
        return elements
    rows, columns = parameter.whole_shape
    small, large = sorted((rows, columns))
    # 5 steps of 4 m^2 n + 2 m^3 operations; an element moved costs as much as about 1,000 of them.
    return elements + 5 * (4 * small**2 * large + 2 * small**3) / 1000


@torch.no_grad()
def share_updates(parameters: list[Parameter]) -> None:
    """Copy each owner's new weights to the ranks that hold the same parameter. Collective."""
    groups: dict[tuple[ProcessGroup, torch.dtype], list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.data_group.size() > 1:
            groups[parameter.data_group, parameter.model.dtype].append(parameter)
    for (group, _), members in groups.items():
        by_owner: list[list[Parameter]] = [[] for _ in range(group.size())]
        for parameter in members:
            by_owner[parameter.owner].append(parameter)
        for round_ in _rounds(by_owner):
            _exchange(round_, group)


def _rounds(by_owner: list[list[Parameter]]) -> list[list[list[Parameter]]]:
    """Cut every owner's list into rounds of at most EXCHANGE_ELEMENTS (at least one parameter)."""
    cut: list[list[list[Parameter]]] = []
    for owner, members in enumerate(by_owner):
        index, size = 0, 0
        for parameter in members:
            if size and size + parameter.model.numel() > EXCHANGE_ELEMENTS:
                index, size = index + 1, 0
            while len(cut) <= index:
                cut.append([[] for _ in by_owner])
            cut[index][owner].append(parameter)
            size += parameter.model.numel()
    return cut


def _exchange(by_owner: list[list[Parameter]], group: ProcessGroup) -> None:
    sizes = [sum(p.model.numel() for p in members) for members in by_owner]
    sample = next(p for members in by_owner for p in members).model
    width = max(sizes)
    mine = torch.zeros(width, dtype=sample.dtype, device=sample.device)
    own = by_owner[group.rank()]
    if own:
        torch.cat([p.model.data.flatten() for p in own], out=mine[: sizes[group.rank()]])
    everyone = torch.empty(group.size() * width, dtype=sample.dtype, device=sample.device)
    torch.distributed.all_gather_into_tensor(everyone, mine, group=group)
    for owner, members in enumerate(by_owner):
        if owner == group.rank():
            continue
        offset = owner * width
        for parameter in members:
            elements = parameter.model.numel()
            flat = everyone[offset : offset + elements]
            parameter.model.data.copy_(flat.view_as(parameter.model))
            offset += elements

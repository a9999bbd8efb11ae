"""Whether ranks that should hold the same weights do, before an exchange makes them equal again.

A weight that one rank damaged (memory, a kernel, an index out of range) is overwritten by its owner
at the end of the step, when its gradients have been summed with everybody's and nothing is left to
see. So it is looked for at every step: a sum of the bits of each parameter, compared as numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from equilibrium_mcore.optim.parameters import Parameter
from equilibrium_mcore.parallel.object_group import object_group

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAMED = 3  # parameters that the error names


class ReplicaError(RuntimeError):
    """Weights are not what they should be, by damage; names rank and parameter."""

    is_told = True  # a stack says nothing of it


@torch.no_grad()
def check_replicas(
    parameters: list[Parameter],
    *,
    owned: Iterable[Parameter] = (),
    weights_of: Callable[[Parameter], Tensor] = lambda parameter: parameter.main,
    step: int,
) -> None:
    """Raise ReplicaError on every rank where replicas of a parameter differ. Collective.

    `weights_of` gives what the model's weight of an `owned` parameter was made of: it still rounds
    to it, unless one of the two is damaged.
    """
    by_group: dict[ProcessGroup, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.data_group.size() > 1:
            by_group[parameter.data_group].append(parameter)
    wrong = [text for group, members in by_group.items() for text in _differences(group, members)]
    wrong += _not_rounded(owned, weights_of)
    raise_everywhere(
        wrong,
        parameters[0].model.device,
        lambda said: (
            f"step {step}: replicas of weights differ before the update: {said}. The memory of a "
            "rank or a kernel that wrote to it is damaged; nothing was updated. Resume from the "
            "latest checkpoint, without that host if it happens again"
        ),
    )


def raise_everywhere(wrong: list[str], device: torch.device, message: Callable[[str], str]) -> None:
    """Raise ReplicaError on all ranks if any has found something. Collective.

    Args:
        wrong: what this rank found.
        message: of all that was found, put together.
    """
    found = torch.tensor(float(bool(wrong)), device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    if not found.item():
        return
    everywhere: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, wrong, group=object_group())
    wrong = list(dict.fromkeys(text for texts in everywhere for text in texts))
    more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    raise ReplicaError(message("; ".join(wrong[:NAMED]) + more))


def _differences(group: ProcessGroup, members: list[Parameter]) -> list[str]:
    """Rank and parameter where a checksum is not that of most ranks."""
    mine = torch.stack([checksum(p.model.data) for p in members])
    everyone = mine.new_empty(group.size() * len(members))
    torch.distributed.all_gather_into_tensor(everyone, mine, group=group)
    sums = everyone.view(group.size(), len(members)).cpu()
    ranks = torch.distributed.get_process_group_ranks(group)
    places = (sums != sums[0]).any(dim=0).nonzero().flatten().tolist()
    return [f"{members[place].name} {_where(sums[:, place].tolist(), ranks)}" for place in places]


def _not_rounded(
    owned: Iterable[Parameter], weights_of: Callable[[Parameter], Tensor]
) -> list[str]:
    """Parameters whose main weight is not the one that the model's weight was rounded from."""
    kept = [p for p in owned if p.main is not p.model]
    if not kept:
        return []
    same = [(weights_of(p).to(p.model.dtype) == p.model.data).all() for p in kept]
    rank = torch.distributed.get_rank()
    return [
        f"{parameter.name} on rank {rank}: its main weight is not that of its model"
        for parameter, equal in zip(kept, torch.stack(same).tolist(), strict=True)
        if not equal
    ]


def _where(sums: list[int], ranks: list[int]) -> str:
    """Which ranks hold other weights than most; of two ranks nothing says which."""
    (most, count), *_ = Counter(sums).most_common()
    among = ", ".join(map(str, ranks))
    if 2 * count <= len(sums):
        return f"is not the same on ranks {among}"
    wrong = [str(rank) for rank, found in zip(ranks, sums, strict=True) if found != most]
    return f"on rank {', '.join(wrong)} is not that of the others (ranks {among})"


def checksum(tensor: Tensor) -> Tensor:
    """A sum of a tensor's bits, an int64 scalar on its device: whole numbers, so in any order."""
    return tensor.view(BITS[tensor.element_size()]).sum(dtype=torch.int64)

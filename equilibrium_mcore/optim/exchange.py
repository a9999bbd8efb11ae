"""How the owners' new weights reach the ranks that hold the same parameters.

All that a group exchanges is one flat list of elements, by owner, and a copy may cut a parameter
anywhere. So it is cut into rounds of a bounded total, in which every owner takes part in proportion
to what it owns. Owners have unequal shares, and an all-gather of unequal shares would pad all of
them to the largest. Instead a round has two collectives: an all-to-all after which every rank holds
an equal slice of the round, and an all-gather of these slices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from equilibrium_mcore.optim.parameters import Parameter

# Elements of a round, all owners together: bounds the memory of the exchange.
ROUND_ELEMENTS = 64 * 2**20


class Piece(NamedTuple):
    """Elements `start` to `stop` of a flattened parameter."""

    parameter: Parameter
    start: int
    stop: int


class Round(NamedTuple):
    """What is exchanged at once: `first[o]` to `last[o]` of the elements that owner o has."""

    first: list[int]
    last: list[int]

    @property
    def sizes(self) -> list[int]:
        """Elements of each owner."""
        return [last - first for first, last in zip(self.first, self.last, strict=True)]

    @property
    def slice_elements(self) -> int:
        """Elements that each rank holds between the two collectives; the last ones are padding."""
        return -(-sum(self.sizes) // len(self.first))

    def splits(self, owner: int) -> list[int]:
        """Elements that `owner` sends to each rank: where its share meets the rank's slice."""
        begin = sum(self.sizes[:owner])
        end, each = begin + self.sizes[owner], self.slice_elements
        return [
            max(0, min(end, (rank + 1) * each) - max(begin, rank * each))
            for rank in range(len(self.first))
        ]


def plan_rounds(sizes: Sequence[int], *, elements: int = ROUND_ELEMENTS) -> list[Round]:
    """Rounds of at most `elements` plus one of each owner, given how many each owner has."""
    count = -(-sum(sizes) // elements)
    cuts = [[size * number // count for size in sizes] for number in range(count + 1)]
    return [Round(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]


@torch.no_grad()
def share_updates(
    parameters: list[Parameter],
    *,
    see: Callable[[Parameter, Tensor, Tensor], None] | None = None,
) -> None:
    """Copy each owner's new weights to the ranks that hold the same parameter. Collective.

    `see` is called on the receiving ranks with a parameter, elements of it, and what is going to
    replace them.
    """
    groups: dict[tuple[ProcessGroup, torch.dtype], list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.data_group.size() > 1:
            groups[parameter.data_group, parameter.model.dtype].append(parameter)
    for (group, _), members in groups.items():
        by_owner: list[list[Parameter]] = [[] for _ in range(group.size())]
        for parameter in members:
            by_owner[parameter.owner].append(parameter)
        sizes = [sum(p.model.numel() for p in owned) for owned in by_owner]
        for number in plan_rounds(sizes, elements=ROUND_ELEMENTS):
            _exchange(number, by_owner, group, see)


def _exchange(
    round_: Round,
    by_owner: list[list[Parameter]],
    group: ProcessGroup,
    see: Callable[[Parameter, Tensor, Tensor], None] | None,
) -> None:
    rank, each = group.rank(), round_.slice_elements
    pieces = [
        list(_pieces(owned, first, last))
        for owned, first, last in zip(by_owner, round_.first, round_.last, strict=True)
    ]
    like = next(piece for owned in pieces for piece in owned).parameter.model
    own = [_elements(piece) for piece in pieces[rank]]
    mine = torch.cat(own) if own else like.new_empty(0)
    slice_ = like.new_zeros(each)
    received = [round_.splits(owner)[rank] for owner in range(group.size())]
    torch.distributed.all_to_all_single(
        slice_[: sum(received)],
        mine,
        output_split_sizes=received,
        input_split_sizes=round_.splits(rank),
        group=group,
    )
    everyone = like.new_empty(group.size() * each)
    torch.distributed.all_gather_into_tensor(everyone, slice_, group=group)
    offset = 0
    for owner, owned in enumerate(pieces):
        for piece in owned:
            flat = everyone[offset : offset + piece.stop - piece.start]
            offset += piece.stop - piece.start
            if owner == rank:
                continue
            elements = _elements(piece)
            if see is not None:
                see(piece.parameter, elements, flat)
            elements.copy_(flat)


def _pieces(parameters: list[Parameter], first: int, last: int) -> Iterator[Piece]:
    """The elements `first` to `last` of the parameters, flat and one after the other."""
    begin = 0
    for parameter in parameters:
        size = parameter.model.numel()
        start, stop = max(first - begin, 0), min(last - begin, size)
        if start < stop:
            yield Piece(parameter, start, stop)
        begin += size


def _elements(piece: Piece) -> Tensor:
    """The piece's own memory, flat; parameters are contiguous."""
    return piece.parameter.model.data.view(-1)[piece.start : piece.stop]

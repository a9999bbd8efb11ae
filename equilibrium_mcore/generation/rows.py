"""Which rank continues which requests, and what it has prefilled: the same plan on every rank.

A plan is made of shapes that all ranks of the world agree on, since they step together: experts
exchange tokens, and pipeline stages expect tensors of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from equilibrium_mcore.generation.interface import Request


@dataclass(frozen=True)
class Pack:
    """Prompts that a rank prefills in one forward pass.

    first: the place of the first of them among the prompts of its group. Each is without its last
    token, which is the first step's.
    """

    first: int
    prompts: tuple[int, ...]  # numbers of requests that have these prompts


@dataclass(frozen=True)
class Group:
    """Rows that a rank steps in one forward pass.

    requests: a number for each real row. prompts: the numbers of requests that stand for the
    different prompts of more than one token, longest first; source: where in `prompts` each row's
    is, -1 for a prompt of one token.
    """

    requests: tuple[int, ...]
    prompts: tuple[int, ...]
    source: tuple[int, ...]
    packs: tuple[Pack, ...]


@dataclass(frozen=True)
class Wave:
    """Rows that are continued together, of all ranks.

    groups: by data rank, then row group. The sizes are the same for every group of the world: rows
    a multiple of what sequence parallelism needs, tokens of a pack likewise, packs of a group.
    """

    groups: tuple[tuple[Group, ...], ...]
    rows: int
    pack_tokens: int
    packs: int
    capacity: int


def plan(
    requests: Sequence[Request],
    *,
    ranks: int,
    groups: int,
    rows_at_once: int,
    tokens_at_once: int,
    multiple: int,
    max_new_tokens: int,
) -> list[Wave]:
    """Waves over `ranks` data ranks of `groups` row groups each.

    Args:
        rows_at_once: of a rank, at most: its memory is theirs (at least one for each group).
        tokens_at_once: of a pack, at most; but a pack holds one prompt, however long.
        multiple: of which rows and tokens of a pack are.
    """
    # Prompts of like length together: a wave's memory is that of its longest. Samples of one prompt
    # stay together, since it is prefilled once for a group.
    order = sorted(
        range(len(requests)),
        key=lambda i: (len(requests[i].prompt.ids), requests[i].prompt.ids.tobytes(), i),
    )
    at_once = ranks * groups * max(rows_at_once // groups, 1)
    waves = []
    for start in range(0, len(order), at_once):
        mine = order[start : start + at_once]
        waves.append(_wave(mine, requests, ranks, groups, tokens_at_once, multiple, max_new_tokens))
    return waves


def _wave(
    numbers: list[int],
    requests: Sequence[Request],
    ranks: int,
    groups: int,
    tokens_at_once: int,
    multiple: int,
    max_new_tokens: int,
) -> Wave:
    shares = ranks * groups
    made = [
        _group(
            numbers[_border(i, shares, numbers) : _border(i + 1, shares, numbers)],
            requests,
            tokens_at_once,
        )
        for i in range(shares)
    ]
    tokens = [
        sum(len(requests[number].prompt.ids) - 1 for number in pack.prompts)
        for group in made
        for pack in group.packs
    ]
    return Wave(
        groups=tuple(tuple(made[rank * groups : (rank + 1) * groups]) for rank in range(ranks)),
        rows=_up(max(len(group.requests) for group in made), multiple),
        pack_tokens=_up(max(tokens, default=1), multiple),
        packs=max(len(group.packs) for group in made),
        capacity=max(len(requests[number].prompt.ids) for number in numbers) + max_new_tokens - 1,
    )


def _border(share: int, shares: int, numbers: list[int]) -> int:
    """Where a share of the numbers begins: neighbours stay together."""
    return share * len(numbers) // shares


def _group(numbers: list[int], requests: Sequence[Request], tokens_at_once: int) -> Group:
    by_ids: dict[bytes, int] = {}
    for number in reversed(numbers):
        ids = requests[number].prompt.ids
        if len(ids) > 1:
            by_ids.setdefault(ids.tobytes(), number)
    prompts = list(by_ids.values())
    place = {ids: index for index, ids in enumerate(by_ids)}
    packs: list[Pack] = []
    first, tokens = 0, 0
    for index, number in enumerate(prompts):
        length = len(requests[number].prompt.ids) - 1
        if index > first and tokens + length > tokens_at_once:
            packs.append(Pack(first, tuple(prompts[first:index])))
            first, tokens = index, 0
        tokens += length
    if prompts:
        packs.append(Pack(first, tuple(prompts[first:])))
    source = tuple(place.get(requests[number].prompt.ids.tobytes(), -1) for number in numbers)
    return Group(tuple(numbers), tuple(prompts), source, tuple(packs))


def _up(value: int, multiple: int) -> int:
    return -(-max(value, 1) // multiple) * multiple

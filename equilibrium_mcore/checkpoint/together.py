"""What one rank does for all, and what all do alike: a failure anywhere is an error everywhere.

Without it, the ranks that succeeded would wait at the next collective for those that did not.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch.distributed

from equilibrium_mcore.parallel.object_group import object_group


def on_first_rank[T](work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; what it raises there, too. Collective."""
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        outcome = list(_try(work))
    torch.distributed.broadcast_object_list(outcome, src=0, group=object_group())
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_every_rank[T](work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, in their order, on every rank. Collective.

    Where it raises on some, every rank raises what the first of them did.
    """
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, _try(work), group=object_group())
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def _try[T](work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, as_sent(error)


def as_sent(error: Exception) -> Exception:
    """The error, or its text where it cannot travel to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

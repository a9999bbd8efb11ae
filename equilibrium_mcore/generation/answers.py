"""Answers while they are drawn: of one data rank, and then of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.generation.interface import Request, Rollout, Sampling
from equilibrium_mcore.parallel.object_group import object_group


@dataclass
class Answers:
    """What was drawn for the requests of this data rank."""

    requests: Sequence[Request]
    sampling: Sampling
    ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    support: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add(self, number: int, token: int, logprob: float, support: np.ndarray | None) -> bool:
        """Whether the answer is finished with this token."""
        ids = self.ids.setdefault(number, [])
        ids.append(token)
        self.logprobs.setdefault(number, []).append(logprob)
        if support is not None:
            kept = support.nonzero()[0].astype(np.int32)
            self.support.setdefault(number, []).append(kept)
        return token in self.sampling.stop_ids or len(ids) == self.sampling.max_new_tokens

    def of_all(self, *, counts: bool, version: int) -> list[Rollout]:
        """The rollouts of all data ranks, in the order of the requests. Collective.

        `counts` is true on one of the ranks that drew the same.
        """
        mine = {
            number: (
                np.array(ids, dtype=np.int32),
                np.array(self.logprobs[number], dtype=np.float32),
                tuple(self.support[number]) if number in self.support else None,
            )
            for number, ids in self.ids.items()
        }
        all_of_them = _gathered(mine if counts else {})
        return [
            Rollout(
                request=request,
                ids=ids,
                logprobs=logprobs,
                finish="end" if ids[-1] in self.sampling.stop_ids else "length",
                version=version,
                support=support,
            )
            for request, (ids, logprobs, support) in (
                (request, all_of_them[number]) for number, request in enumerate(self.requests)
            )
        ]


def _gathered(values: dict[int, Any]) -> dict[int, Any]:
    """The values of all ranks of the world. Collective."""
    found: list[dict[int, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, values, group=object_group())
    return {number: value for part in found for number, value in part.items()}

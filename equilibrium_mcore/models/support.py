"""Tokens that are drawn from a part of the vocabulary: of which ids their probabilities are.

top-k and top-p keep, at each position, some ids, between which the probability is shared again. A
ratio of two policies is one of like with like only where both share it between the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SUPPORT = "support"  # of a batch, beside its tensors: a Support of its tokens


@dataclass(frozen=True)
class Support:
    """Of each of N tokens, the ids that its label was drawn from; without any, all of them.

    `counts` int64 [N]: how many ids a token has in `ids`, int32, one token's after another's.
    """

    ids: Tensor
    counts: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Support]) -> Support:
        """Of the tokens of all parts, in their order."""
        ids, counts = torch.cat([p.ids for p in parts]), torch.cat([p.counts for p in parts])
        return cls(ids, counts)

    def outside(self, place: Tensor, *, first: int, width: int) -> Tensor:
        """Which ids the tokens at `place` cannot have: bool of `place`'s shape and [V].

        place: int64, of tokens among the N. `first` and `width`: the slice of the vocabulary that
        a tensor rank holds.
        """
        counts, ends = self.counts.to(place.device), self.counts.cumsum(0).to(place.device)
        places = place.flatten()
        here = counts[places]
        rows = torch.arange(len(places), device=place.device).repeat_interleave(here)
        of_row = torch.arange(len(rows), device=place.device) - (here.cumsum(0) - here)[rows]
        ids = self.ids.to(place.device)[(ends[places] - here)[rows] + of_row].long() - first
        mine = (ids >= 0) & (ids < width)
        out = (here > 0).unsqueeze(1).repeat(1, width)
        out[rows[mine], ids[mine]] = False
        return out.view(*place.shape, width)

"""How a token is drawn: a function of the logits, the seed and the place, without a generator.

The token is the largest of logits / temperature + Gumbel noise, where the noise is a hash of seed,
prompt, sample, position and token id (the Gumbel-max trick). So it does not matter which rank draws
it, beside what, or how often: a tensor-parallel rank makes the noise of its slice of the
vocabulary, and one all-reduce finds the largest. The inverse of a cumulative distribution would
move every border between tokens with the rounding of one logit.

Shapes: R rows, V this rank's slice of the padded vocabulary, in rank order, W the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.generation.interface import Request, Sampling
from equilibrium_mcore.models.logprobs import label_log_probabilities


@dataclass(frozen=True)
class Drawn:
    """A token of every row.

    Attributes:
        ids: [R], int64.
        logprobs: [R], of the token in the distribution that it was drawn from; at temperature 0, of
            the plain logits.
        support: [R, W], with top-k or top-p, True for the ids that could be drawn; else None.
    """

    ids: Tensor
    logprobs: Tensor
    support: Tensor | None = None


def row_seeds(requests: Sequence[Request], sampling: Sampling) -> np.ndarray:
    """What the noise of each request is drawn from, int64 [R]."""
    seeds = np.empty(len(requests), dtype=np.int64)
    for row, request in enumerate(requests):
        text = f"{sampling.seed} {request.prompt.key} {request.sample}"
        digest = blake2b(text.encode(), digest_size=8).digest()
        seeds[row] = int.from_bytes(digest, "little", signed=True)
    return seeds


def draw(
    logits_RV: Tensor,
    *,
    sampling: Sampling,
    seeds_R: Tensor,
    positions_R: Tensor,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup,
) -> Drawn:
    """A token of every row. Collective over `tp_group`, whose ranks all get the same.

    Args:
        logits_RV: of this rank's slice.
        seeds_R: int64, of `row_seeds`.
        positions_R: int64, of the token in its answer, from 0.
        vocab_size: ids from here on pad the vocabulary; they are never drawn.
    """
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    plain_RV = logits_RV.to(wide)
    if sampling.temperature == 0:
        score_RV = _real(plain_RV, vocab_size, tp_group)
        ids = _largest(score_RV, tp_group)
        return Drawn(ids, _log_probabilities(plain_RV, ids, 1.0, vocab_size, tp_group))
    score_RV = _real(plain_RV / sampling.temperature, vocab_size, tp_group)
    support = None
    if sampling.top_k or sampling.top_p < 1:
        whole_RW = _gathered(score_RV, tp_group)
        support = supported(whole_RW, top_k=sampling.top_k, top_p=sampling.top_p)
        score_RV = score_RV.masked_fill(~_slice(support, score_RV, tp_group), -torch.inf)
    first = tp_group.rank() * score_RV.shape[1]
    noise_RV = gumbel(seeds_R, positions_R, first=first, width=score_RV.shape[1])
    ids = _largest(score_RV + noise_RV, tp_group)
    if support is None:
        logprobs = _log_probabilities(plain_RV, ids, sampling.temperature, vocab_size, tp_group)
    else:
        within_RW = whole_RW.masked_fill(~support, -torch.inf)
        logprobs = within_RW.gather(1, ids.unsqueeze(1)).squeeze(1) - within_RW.logsumexp(1)
    return Drawn(ids, logprobs, support)


def supported(logits_RW: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """[R, W], True for the ids that may be drawn: the `top_k` likeliest, and of these the fewest
    whose probabilities, which sum to 1, sum to `top_p`. Of equal ones the smaller id comes first.

    logits_RW: after temperature; -inf is never drawn.
    """
    sorted_RW, order_RW = logits_RW.sort(dim=1, descending=True, stable=True)
    keep_RW = sorted_RW > -torch.inf
    if top_k:
        keep_RW[:, top_k:] = False
    if top_p < 1:
        p_RW = sorted_RW.masked_fill(~keep_RW, -torch.inf).softmax(1)
        before_RW = p_RW.cumsum(1) - p_RW
        keep_RW &= before_RW < top_p
        keep_RW[:, 0] = True
    return torch.zeros_like(keep_RW).scatter_(1, order_RW, keep_RW)


def gumbel(seeds_R: Tensor, positions_R: Tensor, *, first: int, width: int) -> Tensor:
    """Noise of the token ids `first` to `first + width`: float32 [R, V], the same on any rank.

    -log(-log(1 - u)), with u a hash of 32 bits: u is finest near 0, where the noise is largest.
    """
    state = _mixed64(_mixed64(seeds_R) + positions_R * _ODD)
    low, high = (state & _MASK).to(torch.int32), (state >> 32).to(torch.int32)
    ids = torch.arange(first, first + width, device=seeds_R.device, dtype=torch.int32)
    x = _mixed32(ids) ^ low.unsqueeze(1)
    x = _mixed32(x.add_(high.unsqueeze(1)))
    u = x.to(torch.float32).mul_(2.0**-32).add_(0.5 + 2.0**-33)
    return u.clamp_(2.0**-33, 1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


# Of 64 bits Stafford's mixer, as in SplitMix64; of 32 bits Wellons's `lowbias32`.
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFF


def _mixed64(x: Tensor) -> Tensor:
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift, 64)) * factor
    return x ^ _shifted(x, 31, 64)


def _mixed32(x: Tensor) -> Tensor:
    """Of int32 [...]; in place."""
    x = x.clone() if x.dim() == 1 else x
    x ^= _shifted(x, 16, 32)
    x *= 0x7FEB352D
    x ^= _shifted(x, 15, 32)
    x *= -2073254261  # 0x846CA68B
    x ^= _shifted(x, 16, 32)
    return x


def _shifted(x: Tensor, by: int, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (x >> by) & ((1 << (bits - by)) - 1)


def _real(score_RV: Tensor, vocab_size: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """Without the rows that pad the vocabulary."""
    real = max(vocab_size - group.rank() * score_RV.shape[1], 0)
    if real >= score_RV.shape[1]:
        return score_RV
    score_RV = score_RV.clone()
    score_RV[:, real:] = -torch.inf
    return score_RV


def _largest(score_RV: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The id of the largest of a row; of equal ones the smallest. One all-reduce."""
    value, index = score_RV.max(dim=1)
    # torch names some index of equal values; the smallest is wanted, whatever the layout.
    index = (score_RV == value.unsqueeze(1)).to(torch.int8).argmax(dim=1)
    ids = index + group.rank() * score_RV.shape[1]
    if group.size() == 1:
        return ids
    # A float's bits as a whole number that is ordered as floats are, and the id below them.
    bits = value.to(torch.float32).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    packed = (ordered << 32) | (_MASK - ids)
    torch.distributed.all_reduce(packed, op=torch.distributed.ReduceOp.MAX, group=group)
    return _MASK - (packed & _MASK)


def _gathered(score_RV: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return score_RV
    parts = [torch.empty_like(score_RV) for _ in range(group.size())]
    torch.distributed.all_gather(parts, score_RV.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _slice(whole_RW: Tensor, like_RV: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    width = like_RV.shape[1]
    return whole_RW[:, group.rank() * width : (group.rank() + 1) * width]


def _log_probabilities(
    logits_RV: Tensor,
    ids: Tensor,
    temperature: float,
    vocab_size: int,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    return label_log_probabilities(
        logits_RV.unsqueeze(0),
        ids.unsqueeze(0),
        vocab_size=vocab_size,
        tp_group=group,
        temperature=temperature,
    )[0]

"""State-space duality (Mamba-2) in plain PyTorch: exact, differentiable, on any device.

Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6 (block decomposition). The
form here batches over groups: the products with B and C are shared by the heads of a group.

Shapes: B batch, L tokens, H heads, P channels per head, G groups, N state size, C chunks,
Q tokens per chunk, R = H / G heads per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    chunk_size: int,
    D_H: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> Tensor:
    """y of `ssd_scan_with_state`, which takes the same arguments."""
    return ssd_scan_with_state(
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, chunk_size=chunk_size, D_H=D_H, seq_idx_BL=seq_idx_BL
    )[0]


def ssd_scan_with_state(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    chunk_size: int,
    D_H: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence  S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T,  y_t = C_t S_t + D x_t.

    Args:
        x_BLHP: inputs.
        dt_BLH: positive step sizes (softplus and bias already applied).
        A_H: negative decay rates.
        B_BLGN, C_BLGN: input and output maps, shared by the H / G heads of a group.
        chunk_size: tokens per chunk; changes rounding and speed, not the function.
        D_H: skip connection per head.
        seq_idx_BL: document of each token; no state crosses from one document to the next.

    Computes in float32 (float64 if x is float64). Returns y in x's dtype, (B, L, H, P), and the
    state after the last token, (B, H, P, N), in the dtype of the computation. A token with a step
    size of 0 leaves the state as it is.
    """
    batch, length, heads, channels = x_BLHP.shape
    groups = B_BLGN.shape[2]
    if heads % groups:
        raise ValueError(f"heads={heads} is not a multiple of groups={groups}")
    dtype = torch.promote_types(x_BLHP.dtype, torch.float32)
    chunk = min(chunk_size, length)
    padding = -length % chunk
    x, dt, B, C = (t.to(dtype) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
    skip = x
    if padding:  # padded tokens have dt = 0: they neither add to the state nor decay it
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, padding))
        if seq_idx_BL is not None:
            seq_idx_BL = F.pad(seq_idx_BL, (0, padding), value=-1)
    chunks, ratio = (length + padding) // chunk, heads // groups

    # (B, C, G, Q, ...) with the heads of a group as R.
    x = (x * dt.unsqueeze(-1)).view(batch, chunks, chunk, groups, ratio, channels)
    x_BCGRQP = x.permute(0, 1, 3, 4, 2, 5)
    B_BCGQN = B.view(batch, chunks, chunk, groups, -1).transpose(2, 3)
    C_BCGQN = C.view(batch, chunks, chunk, groups, -1).transpose(2, 3)
    log_decay = dt * A_H.to(dtype)
    log_BCGRQ = log_decay.view(batch, chunks, chunk, groups, ratio).permute(0, 1, 3, 4, 2)
    cumulative = log_BCGRQ.cumsum(-1)
    same = _same_document(seq_idx_BL, batch, chunks, chunk)

    # 1. Within a chunk: attention with decay.
    difference = cumulative.unsqueeze(-1) - cumulative.unsqueeze(-2)
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if same is not None:
        keep = keep & same.within.view(batch, chunks, 1, 1, chunk, chunk)
    decay_BCGRQQ = difference.masked_fill(~keep, float("-inf")).exp()
    scores_BCGQQ = C_BCGQN @ B_BCGQN.transpose(-1, -2)
    y = (scores_BCGQQ.unsqueeze(3) * decay_BCGRQQ) @ x_BCGRQP

    # 2. What each chunk adds to the state: (B, C, G, N, R P).
    to_end = (cumulative[..., -1:] - cumulative).exp()
    if same is not None:
        to_end = to_end * same.with_last.view(batch, chunks, 1, 1, chunk)
    weighted = (x_BCGRQP * to_end.unsqueeze(-1)).permute(0, 1, 2, 4, 3, 5)
    added = B_BCGQN.transpose(-1, -2) @ weighted.reshape(batch, chunks, groups, chunk, -1)

    # 3. The state in front of each chunk, by recurrence over chunks.
    carry = cumulative[..., -1].exp()
    if same is not None:
        carry = carry * same.unbroken.view(batch, chunks, 1, 1)
    carry = carry.unsqueeze(-1).expand(-1, -1, -1, -1, channels).flatten(-2)
    state = torch.zeros_like(added[:, 0])
    states = []
    for index in range(chunks):
        states.append(state)
        state = state * carry[:, index].unsqueeze(-2) + added[:, index]

    # 4. What that state gives to the chunk's tokens.
    from_state = C_BCGQN @ torch.stack(states, dim=1)
    from_state = from_state.view(batch, chunks, groups, chunk, ratio, channels)
    from_start = cumulative.exp()
    if same is not None:
        from_start = from_start * same.with_previous.view(batch, chunks, 1, 1, chunk)
    y = y + from_state.transpose(3, 4) * from_start.unsqueeze(-1)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * chunk, heads, channels)[:, :length]
    if D_H is not None:
        y = y + skip * D_H.to(dtype).view(-1, 1)
    state = state.unflatten(-1, (ratio, channels)).permute(0, 1, 3, 4, 2)
    return y.to(x_BLHP.dtype), state.flatten(1, 2)


@dataclass(frozen=True)
class _Documents:
    """Which tokens of a chunk share a document with whom."""

    within: Tensor  # (B, C, Q, Q): two tokens of the chunk
    with_last: Tensor  # (B, C, Q): with the chunk's last token
    with_previous: Tensor  # (B, C, Q): with the last token of the chunk before
    unbroken: Tensor  # (B, C): the chunk before ends in the document that this one ends in


def _same_document(
    seq_idx: Tensor | None, batch: int, chunks: int, chunk: int
) -> _Documents | None:
    if seq_idx is None:
        return None
    ids = seq_idx.view(batch, chunks, chunk)
    last = ids[..., -1:]
    previous = F.pad(last[:, :-1], (0, 0, 1, 0), value=-2)
    return _Documents(
        within=ids.unsqueeze(-1) == ids.unsqueeze(-2),
        with_last=ids == last,
        with_previous=ids == previous,
        unbroken=(last == previous).squeeze(-1),
    )


def causal_conv(
    x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor, *, seq_idx_BL: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution: y_t = bias + sum_k weight[:, K-1-k] x_{t-k}.

    With `seq_idx_BL` a token sees only tokens of its own document. Returns (B, L, C).
    """
    taps = weight_CK.shape[1]
    y = x_BLC * weight_CK[:, -1] + bias_C
    for back in range(1, min(taps, x_BLC.shape[1])):
        shifted = F.pad(x_BLC[:, :-back], (0, 0, back, 0))
        if seq_idx_BL is not None:
            earlier = F.pad(seq_idx_BL[:, :-back], (back, 0), value=-1)
            shifted = shifted * (earlier == seq_idx_BL).unsqueeze(-1)
        y = y + shifted * weight_CK[:, taps - 1 - back]
    return y

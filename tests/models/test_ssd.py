"""The chunked scan against the recurrence it stands for, token by token in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equilibrium_mcore.models.ssd import causal_conv, ssd_scan

BATCH, HEADS, CHANNELS, STATE = 2, 4, 3, 5
NAMES = ("x", "dt", "A", "B", "C", "D")

# Document lengths of the two sequences of a batch of 13 tokens, with what chunks of 4 make of them.
DOCUMENTS = {
    "one document": ([13], [13]),
    "ends inside a chunk": ([6, 7], [3, 10]),
    "ends at a chunk's end": ([4, 9], [8, 5]),
    "crosses several chunks": ([2, 11], [11, 2]),
    "several in one chunk": ([1, 1, 1, 10], [5, 2, 1, 4, 1]),
    "one token each": ([1] * 13, [12, 1]),
}


def inputs(length: int, groups: int, *, seed: int = 0, batch: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": random(batch, length, HEADS, CHANNELS),
        "dt": F.softplus(random(batch, length, HEADS)),
        "A": -torch.exp(0.5 * random(HEADS)),
        "B": random(batch, length, groups, STATE),
        "C": random(batch, length, groups, STATE),
        "D": random(HEADS),
    }


def documents(lengths: tuple[list[int], ...]) -> Tensor:
    rows = [[document for document, n in enumerate(row) for _ in range(n)] for row in lengths]
    return torch.tensor(rows, dtype=torch.int32)


def recurrence(x, dt, A, B, C, D=None, seq_idx=None) -> Tensor:
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = C_t S_t + D x_t, by its definition."""
    batch, length, heads, channels = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    state = torch.zeros(batch, heads, B.shape[-1], channels, dtype=x.dtype)
    outputs = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        if seq_idx is not None and t:
            continues = (seq_idx[:, t] == seq_idx[:, t - 1]).to(x.dtype)
            decay = decay * continues[:, None, None, None]
        arriving = (dt[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None, :]
        state = decay * state + arriving
        y = torch.einsum("bhn,bhnp->bhp", C[:, t], state)
        outputs.append(y if D is None else y + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def values_and_gradients(function, values: dict[str, Tensor], **settings):
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    y = function(*(leaves[name] for name in NAMES if name != "D"), leaves["D"], **settings)
    cotangent = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    return y.detach(), torch.autograd.grad(y, list(leaves.values()), cotangent)


def chunked(x, dt, A, B, C, D, *, seq_idx=None, chunk_size: int) -> Tensor:
    return ssd_scan(x, dt, A, B, C, D_H=D, seq_idx_BL=seq_idx, chunk_size=chunk_size)


def assert_same(values: dict[str, Tensor], *, chunk_size: int, seq_idx: Tensor | None = None):
    expected, expected_gradients = values_and_gradients(recurrence, values, seq_idx=seq_idx)
    got, gradients = values_and_gradients(chunked, values, seq_idx=seq_idx, chunk_size=chunk_size)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for name, one, other in zip(values, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"d/d{name}: {text}"
        )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("length", "chunk_size"), [(16, 4), (13, 4), (13, 5), (13, 1), (7, 64), (1, 4), (8, 8)]
)
def test_values_and_gradients_are_the_recurrences(length, chunk_size, groups):
    assert_same(inputs(length, groups), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 16])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_no_state_crosses_documents(lengths, chunk_size):
    assert_same(inputs(13, groups=2), chunk_size=chunk_size, seq_idx=documents(lengths))


@pytest.mark.parametrize("chunk_size", [4, 16])
def test_a_packed_document_is_as_if_alone(chunk_size):
    v = inputs(13, groups=2, batch=1)
    packed = chunked(*v.values(), seq_idx=documents(([5, 2, 6],)), chunk_size=chunk_size)
    for start, end in ((0, 5), (5, 7), (7, 13)):
        part = {name: t[:, start:end] if t.dim() > 1 else t for name, t in v.items()}
        alone = chunked(*part.values(), chunk_size=chunk_size)
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seq_idx", [None, documents(([6, 7], [3, 10]))], ids=["one", "packed"])
def test_the_chunk_size_does_not_change_the_function(seq_idx):
    v = inputs(13, groups=2)
    first, *others = (
        chunked(*v.values(), seq_idx=seq_idx, chunk_size=size) for size in (1, 2, 3, 7, 13, 256)
    )
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-11, atol=1e-11)


def test_without_the_skip_connection():
    v = inputs(9, groups=2)
    del v["D"]
    torch.testing.assert_close(ssd_scan(*v.values(), chunk_size=4), recurrence(**v))


def test_strong_decay_neither_overflows_nor_poisons_gradients():
    v = inputs(16, groups=1)
    v["A"] = torch.full((HEADS,), -500.0, dtype=torch.float64)  # exp(+500 * steps) is infinite
    assert_same(v, chunk_size=8)
    low = {name: t.float().requires_grad_() for name, t in v.items()}
    y = chunked(*low.values(), chunk_size=8)
    for gradient in torch.autograd.grad(y.sum(), list(low.values())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_output_has_the_dtype_of_x_and_is_computed_wide(dtype, tolerance):
    v = inputs(32, groups=2)
    v |= {name: v[name].to(dtype) for name in ("x", "B", "C")}  # as a mixer passes them
    exact = recurrence(**{name: t.double() for name, t in v.items()})
    got = chunked(*v.values(), chunk_size=8)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_heads_must_divide_among_groups():
    with pytest.raises(ValueError, match="heads=4 is not a multiple of groups=3"):
        ssd_scan(*list(inputs(4, groups=3).values())[:5], chunk_size=4)


# ------------------------------------------------------------------------------ the convolution


def conv_inputs(length: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((BATCH, length, 6), (6, taps), (6,))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0]).mT


@pytest.mark.parametrize(("length", "taps"), [(9, 4), (9, 1), (9, 3), (2, 4), (1, 4), (4, 4)])
def test_convolution_is_torchs_with_left_padding(length, taps):
    leaves = [t.requires_grad_() for t in conv_inputs(length, taps)]
    got, expected = causal_conv(*leaves), conv1d(*leaves)
    torch.testing.assert_close(got, expected)
    cotangent = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    for one, other in zip(
        torch.autograd.grad(got, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_convolution_sees_its_own_document_only(lengths):
    x, weight, bias = conv_inputs(13, 4)
    got = causal_conv(x, weight, bias, seq_idx_BL=documents(lengths))
    for row, parts in enumerate(lengths):
        pieces = x[row : row + 1].split(parts, dim=1)
        expected = torch.cat([conv1d(piece, weight, bias) for piece in pieces], dim=1)
        torch.testing.assert_close(got[row : row + 1], expected)

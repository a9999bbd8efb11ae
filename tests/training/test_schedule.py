"""What a rank is given of a batch, and that making it waits for no device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from equilibrium_mcore.parallel import accelerator

accelerator.install()

from equilibrium_mcore.models import packing  # noqa: E402
from equilibrium_mcore.models.packing import to_rank_order, to_text_order  # noqa: E402
from equilibrium_mcore.training import schedule  # noqa: E402

LENGTHS = [8, 16, 8]
# What needs a value, or a size that depends on values: on a GPU the host waits for it.
WAITS = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "masked_select",
)


class Sent(torch.Tensor):
    """A tensor that was sent to a device: whoever asks for its values waits."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in WAITS or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            raise AssertionError(f"{name} waits for the device")
        if name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool:
            raise AssertionError("a mask as index waits for the device")
        return super().__torch_function__(function, types, args, kwargs)


@pytest.fixture
def sent(monkeypatch) -> None:
    """Whatever is sent to the device is marked."""

    def send(tensor, device):
        return None if tensor is None else tensor.as_subclass(Sent)

    monkeypatch.setattr(packing, "send", send)
    monkeypatch.setattr(schedule, "send", send)


def test_a_mark_notices_a_wait():
    tensor = torch.arange(3).as_subclass(Sent)
    waits = (lambda: int(tensor.sum()), lambda: tensor[tensor > 1], lambda: bool(tensor.any()))
    for wait in waits:
        with pytest.raises(AssertionError, match="waits for the device"):
            wait()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_packed_batches_wait_for_no_device(sent, cp_size):
    """Neither when they are made, nor where attention and Mamba put tokens into their order."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    batch = {"tokens": positions + 100, "labels": positions + 101, "position_ids": positions}
    cp = SimpleNamespace(size=lambda: cp_size, rank=lambda: 0)
    run = SimpleNamespace(
        groups=SimpleNamespace(cp=cp),
        config=SimpleNamespace(data=SimpleNamespace(packing="documents")),
    )
    mine, packed = schedule.rank_batch(batch, run)
    for name in ("tokens", "labels", "position_ids"):
        assert isinstance(mine[name], Sent) and mine[name].shape == (1, 32 // cp_size)
    assert isinstance(packed.cu_seqlens_q, Sent) and isinstance(packed.seq_idx, Sent)
    if cp_size > 1:
        gathered = to_rank_order(torch.arange(32).as_subclass(Sent), cp_size, packed)
        back = to_text_order(gathered, cp_size, packed).as_subclass(torch.Tensor)
        assert torch.equal(back, torch.arange(32))

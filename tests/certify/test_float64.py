"""The float64 adapter: float64 stays, narrower tensors are as before, and a cast is seen."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import tiny_run

WIDE = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).exp()


def _inside(rank_info: RankInfo) -> dict[str, object]:
    from equilibrium_mcore.certify.float64 import in_float64

    half, single = WIDE.bfloat16(), WIDE.to(torch.float32)
    with in_float64():
        found = {
            "float": WIDE.float(),
            "softmax": torch.softmax(WIDE, dim=-1, dtype=torch.float32),
            "softmax by place": torch.softmax(WIDE, -1, torch.float32),
            "method": WIDE.softmax(-1, dtype=torch.float32),
            "log": torch.nn.functional.log_softmax(WIDE, dim=-1, dtype=torch.float32),
            "count": torch.tensor([1, 2]).float(),
            "default": torch.ones(2),
            "float32 float": single.float(),
            "float32 softmax": torch.softmax(single, dim=-1, dtype=torch.float32),
            "bfloat16 float": half.float(),
            "bfloat16 softmax": torch.softmax(half, dim=-1, dtype=torch.float32),
            "bfloat16 alone": torch.softmax(half, dim=-1),
        }
    found["after"] = WIDE.float()
    found["softmax after"] = torch.softmax(WIDE, dim=-1, dtype=torch.float32)
    found["default after"] = torch.ones(2)
    return found


def test_float64_stays_and_the_rest_is_as_before(ranks):
    (found,) = ranks.run(1, _inside)
    narrow = {name for name in found if "float32" in name or "after" in name}
    narrow |= {"bfloat16 float", "bfloat16 softmax"}
    for name, value in found.items():
        wide = torch.bfloat16 if name == "bfloat16 alone" else torch.float64
        assert value.dtype == (torch.float32 if name in narrow else wide), name
    assert torch.equal(found["float"], WIDE)
    for name in ("softmax", "softmax by place", "method"):
        assert torch.equal(found[name], torch.softmax(WIDE, dim=-1))
    assert torch.equal(found["log"], torch.log_softmax(WIDE, dim=-1))
    single = WIDE.to(torch.float32)
    assert torch.equal(found["float32 softmax"], torch.softmax(single, dim=-1))
    assert torch.equal(found["bfloat16 float"], WIDE.bfloat16().float())


class _Narrow(torch.autograd.Function):
    """Right forward; backward, its gradient goes through float32."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(torch.float32).to(torch.float64)


def _watched(rank_info: RankInfo, where: str) -> dict[str, int]:
    from equilibrium_mcore.certify.float64 import NarrowOperations, in_float64

    with in_float64():
        x = WIDE.clone().requires_grad_()
        with NarrowOperations() as watch:
            y = _Narrow.apply(x) if where == "backward" else x * 2
            if where == "forward":
                y = y.half().double()
            y.square().sum().backward()
    return watch.places


@pytest.mark.parametrize("where", ["nowhere", "forward", "backward"])
def test_a_cast_is_seen_and_named(ranks, where):
    (places,) = ranks.run(1, _watched, where)
    assert bool(places) == (where != "nowhere")
    assert all("test_float64.py:" in place for place in places), places


def _dtypes(rank_info: RankInfo, config) -> set[str]:
    """What a run is kept and computed in, after a step."""
    from equilibrium_mcore.certify.float64 import NarrowOperations, in_float64
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    with in_float64(), NarrowOperations() as watch:
        run = setup(config, rank_info, datasets=made_up_datasets(config))
        watch.places.clear()  # initial weights are drawn in float32
        train_step(run)
        kept = [p.model for p in run.optimizer.parameters]
        kept += [p.gradient for p in run.optimizer.parameters]
        kept += [p.main for p in run.optimizer.parameters if p.is_owned]
        kept += [buffer for chunk in run.chunks for _, buffer in chunk.named_buffers()]
        teardown(run)
    return {str(tensor.dtype) for tensor in kept} | set(watch.places)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_step_is_float64(ranks, data, tmp_path, precision):
    moe = {"score_function": "sigmoid", "expert_bias": True, "z_loss_coefficient": 1e-3}
    from tests.support.runs import MODEL

    config = tiny_run(
        data,
        tmp_path,
        model={**MODEL, "moe": {**MODEL["moe"], **moe}},
        parallelism={"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
        training={"precision": precision},
    )
    found = set().union(*ranks.run(2, _dtypes, config))
    # Another precision is what it says, and the check sees it.
    assert (found == {"torch.float64"}) == (precision == "fp32")

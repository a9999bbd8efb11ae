"""The router's product: megatron-core's numbers, and nothing of Transformer Engine."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from equilibrium_mcore.models.router import GlobalRouter


def router_of(module: torch.nn.Module) -> GlobalRouter:
    return next(part for part in module.modules() if isinstance(part, GlobalRouter))


def gate(router: GlobalRouter, gating, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the gradients of input and weight."""
    x, router.weight.grad = x.clone().requires_grad_(), None
    logits = gating(x)
    logits.backward(torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits))
    return logits.detach(), x.grad, router.weight.grad


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]
)
def test_gating_is_megatrons_to_the_bit(small_model, build, dtype, precision):
    router = router_of(build(small_model("E"), dtype=dtype, precision=precision))
    x = torch.randn(5, 3, 24, dtype=dtype)
    theirs = gate(router, super(GlobalRouter, router).gating, x)
    mine = gate(router, router.gating, x)
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_gating_of_float32_takes_nothing_of_transformer_engine(
    small_model, build, monkeypatch, backend
):
    """Its product is in tf32: an H100 sent tokens to other experts than PyTorch's product did."""

    def refused(*arguments, **named):
        raise AssertionError("Transformer Engine's product was called")

    monkeypatch.setattr(moe_utils, "te_general_gemm", refused)
    router = router_of(build(small_model("E"), dtype=torch.float32))
    router.config.transformer_impl = backend
    x = torch.randn(5, 3, 24)
    with pytest.raises(AssertionError, match="was called"):
        super(GlobalRouter, router).gating(x)
    gate(router, router.gating, x)

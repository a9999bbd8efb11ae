"""The least of each library, in seconds: what fails here fails everywhere."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.parallel import accelerator

pytestmark = pytest.mark.gpu


def test_a_triton_kernel_runs(rehearsal):
    if rehearsal:
        pytest.skip("Triton's kernels need a GPU")
    import triton
    import triton.language as tl

    @triton.jit
    def double(source, target, count, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(source + offsets, mask=offsets < count)
        tl.store(target + offsets, values * 2, mask=offsets < count)

    source = torch.arange(1000, dtype=torch.float32, device=accelerator.device())
    target = torch.zeros_like(source)
    double[(triton.cdiv(1000, 256),)](source, target, 1000, BLOCK=256)
    assert torch.equal(target, 2 * source)


def test_a_product_on_the_device():
    ones = torch.ones(64, 64, device=accelerator.device(), dtype=torch.bfloat16)
    assert (ones @ ones == 64).all()

"""The kernel tier of the certificate, and Transformer Engine's cut of packed documents."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.parallel import accelerator

pytestmark = pytest.mark.gpu


def test_kernels_agree_with_the_reference(rehearsal, groups):
    from equilibrium_mcore.certify.kernels import certify_kernels

    name = "quickstart" if rehearsal else "pretrain_3b"
    overrides = [] if rehearsal else ["training.precision=fp8"]
    config = load_run(f"configs/runs/{name}.yaml", overrides)
    verdicts = certify_kernels(config, groups, progress=print)
    for v in verdicts:
        print(f"{v.what}: {v.difference:.2e} (<= {v.tolerance:.1e}) {v.where}")
    assert all(v.passed for v in verdicts)


def test_documents_are_cut_as_transformer_engine_cuts_them(rehearsal):
    if rehearsal:
        pytest.skip("the kernel is Transformer Engine's")
    import transformer_engine_torch as tex

    from equilibrium_mcore.models.packing import rank_tokens

    lengths = torch.tensor([16, 8, 48, 24], device=accelerator.device())
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    for cp_size in (2, 4):
        for rank in range(cp_size):
            theirs = tex.thd_get_partitioned_indices(ends, 96, cp_size, rank)
            mine = rank_tokens(lengths, cp_size=cp_size, cp_rank=rank)
            assert torch.equal(mine, theirs.long())

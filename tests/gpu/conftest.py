"""One process and one rank for every comparison of a CUDA path with its PyTorch reference.

Without a GPU, or without Transformer Engine and mamba-ssm, these tests skip and say why. With
EQUILIBRIUM_GPU_REHEARSAL=1 those that make sense run on the CPU, at small sizes and with the
PyTorch backend on both sides: so the tests themselves are known to work before they meet a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from equilibrium_mcore.parallel import accelerator

REHEARSAL = os.environ.get("EQUILIBRIUM_GPU_REHEARSAL") == "1"
NEEDED = ("transformer_engine", "mamba_ssm", "causal_conv1d")


def why_not() -> str | None:
    """Why nothing can be compared here; None when it can."""
    if not accelerator.has_cuda():
        return "no CUDA device (EQUILIBRIUM_GPU_REHEARSAL=1 rehearses these tests on the CPU)"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    """Skip, or get the device ready. It comes before every other fixture of this folder."""
    reason = why_not()
    if reason and not (REHEARSAL and not accelerator.has_cuda()):
        pytest.skip(reason)
    accelerator.install()
    accelerator.quiet_libraries()


@pytest.fixture(scope="session")
def rehearsal() -> bool:
    """Whether the PyTorch backend stands on both sides, on a CPU."""
    return not accelerator.has_cuda()


@pytest.fixture(scope="module")
def groups() -> Iterator:
    """Process groups of one rank, for modules that are built by hand."""
    from equilibrium_mcore.parallel.process_groups import one_rank

    with one_rank(seed=0) as found:
        yield found

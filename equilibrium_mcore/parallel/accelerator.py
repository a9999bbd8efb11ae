"""The device that this process computes on: a CUDA GPU, or the CPU through an adapter.

megatron-core names `torch.cuda` everywhere. Where a CUDA device exists nothing is touched. Where
none exists, `install()` maps those names to the CPU once per process, so that the very same
megatron- core code runs on gloo ranks. Call it before megatron-core is imported.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch

from equilibrium_mcore.config.schema import ParallelismConfig

_installed = False


def has_cuda() -> bool:
    """Whether this host has a usable CUDA device (before any adapter is installed or after)."""
    return torch.backends.cuda.is_built() and torch._C._cuda_getDeviceCount() > 0


def install() -> None:
    """Make `torch.cuda` usable on this host. Does nothing where a CUDA device exists."""
    global _installed
    if _installed:
        return
    if not has_cuda():
        from equilibrium_mcore.parallel import cpu_adapter

        cpu_adapter.install()
    _installed = True


def order_kernels(layout: ParallelismConfig) -> None:
    """Have a GPU begin kernels in the order of their launch, where `layout` needs it.

    Under tensor and context parallelism megatron-core launches a collective before the product
    that hides it, and with one queue it begins first. Elsewhere more queues are better: a gradient
    bucket's sum would hold up the kernels after it. A value that the user has set stays. Called
    before the GPU is used; without one it has no effect.
    """
    if layout.tensor > 1 or layout.context > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def quiet_libraries() -> None:
    """Keep libraries' notes about missing fast packages and deprecations out of a run's log."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformer_engine)\.")
    for name in ("megatron", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def device() -> torch.device:
    """The device on which this process puts tensors."""
    if has_cuda():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def communication_backend() -> str:
    """torch.distributed's backend for tensors on this host's device: nccl or gloo."""
    return "nccl" if has_cuda() else "gloo"


def memory_gib() -> float:
    """Peak memory of this process so far in GiB: of the GPU's allocator, or resident on the CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""Errors of a full device are recognised whoever raised them, and no others."""

from __future__ import annotations

import pytest
import torch

from tools.bench.measure.out_of_memory import is_out_of_memory

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error\nLast error:\n"
        "Cuda failure 2 'out of memory'"
    ),
    torch.distributed.DistBackendError("NCCL WARN Failed to CUDA calloc async 608 bytes"),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ValueError("out of memory"),  # whoever says so with this class has another reason
    None,
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:40])
def test_full(error):
    assert is_out_of_memory(error)
    outer = RuntimeError("backward failed")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[:40])
def test_other(error):
    assert not is_out_of_memory(error)

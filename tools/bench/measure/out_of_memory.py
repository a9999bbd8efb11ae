"""Whether an error says that a device's memory is full, whichever library raised it."""

from __future__ import annotations

import torch

# Only torch's allocator has a class for it. The others raise a RuntimeError with a text: CUDA
# itself and Triton ("Triton Error [CUDA]: out of memory", "CUDA error: out of memory"), cuBLAS and
# cuDNN by the name of a status, NCCL by what its own allocation said.
SAID = (
    "out of memory",
    "cudaerrormemoryallocation",
    "cuda_error_out_of_memory",
    "status_alloc_failed",  # CUBLAS_, CUDNN_, CUSPARSE_
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "failed to cuda malloc",
    "failed to cuda calloc",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Of a torch.OutOfMemoryError, of such a RuntimeError, or of what one was raised from.

    Triton's OutOfResources is none: a kernel wants more shared memory than a device ever has.
    """
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(said in text for said in SAID):
        return True
    return is_out_of_memory(error.__cause__ or error.__context__)

"""Maps the `torch.cuda` names that megatron-core uses to the CPU.

Three groups: questions and waits that have a trivial answer on a CPU (`_TRIVIAL`), random-number
state (the CPU's generator takes the GPU's part), and tensors asked for on a cuda device, which are
made on the CPU. Nothing in megatron-core is edited; `install()` is idempotent and meant for hosts
without a CUDA device only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys

import torch
import torch.utils._device

_CPU = torch.device("cpu")


class _Stream:
    """A stream of a device that runs everything in order."""

    device = _CPU
    device_index = 0
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *args, **kwargs) -> None: ...
    def wait_stream(self, stream) -> None: ...
    def wait_event(self, event) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        return event or _Event()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """An event on such a stream: it has always happened."""

    def __init__(self, *args, **kwargs) -> None: ...
    def record(self, stream=None) -> None: ...
    def wait(self, stream=None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


def _nothing():
    """A new function that does nothing. torch's compiler wants each name to be another object."""
    return lambda *args, **kwargs: None


def _null_context():
    return lambda *args, **kwargs: contextlib.nullcontext()


_TRIVIAL = {
    "current_device": lambda: _CPU,
    "device_count": lambda: 0,
    "set_device": _nothing(),
    "synchronize": _nothing(),
    "empty_cache": _nothing(),
    "reset_peak_memory_stats": _nothing(),
    "ipc_collect": _nothing(),
    "init": _nothing(),
    "_lazy_init": _nothing(),
    "memory_allocated": lambda *a: 0,
    "memory_reserved": lambda *a: 0,
    "max_memory_allocated": lambda *a: 0,
    "max_memory_reserved": lambda *a: 0,
    "memory_stats": lambda *a: {},
    "is_current_stream_capturing": lambda: False,
    "get_device_capability": lambda *a: (0, 0),
    "current_stream": lambda *a: _Stream(),
    "default_stream": lambda *a: _Stream(),
    "set_stream": _nothing(),
    "Stream": _Stream,
    "Event": _Event,
    "stream": _null_context(),
    "device": _null_context(),
    "FloatTensor": torch.FloatTensor,
    "HalfTensor": torch.HalfTensor,
    "BFloat16Tensor": torch.BFloat16Tensor,
    "IntTensor": torch.IntTensor,
    "LongTensor": torch.LongTensor,
    "ByteTensor": torch.ByteTensor,
    "DoubleTensor": torch.DoubleTensor,
}

_FACTORIES = (
    "empty zeros ones full tensor rand randn randint randperm arange linspace eye as_tensor "
    "empty_like zeros_like ones_like full_like rand_like randn_like"
).split()
_METHODS = "new_empty new_zeros new_ones new_full new_tensor".split()


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(make):
    """The factory function `make`, with cuda devices replaced by the CPU and pinning dropped."""

    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return make(*args, **kwargs)

    return wrapper


def _get_rng_state(device=None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device=None, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _install_random() -> None:
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = _get_rng_state
        module.set_rng_state = _set_rng_state
        module.manual_seed = _manual_seed
        module.manual_seed_all = _manual_seed


def _install_tensors() -> None:
    # `with torch.device("meta")` recognises the factories by identity. Filled now, its table holds
    # the plain functions, which the wrappers below call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))

    plain_to, plain_type = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return plain_to(self, *args, **kwargs)

    def type_(self, *args, **kwargs):
        # megatron-core recognises its parameters by names such as 'torch.cuda.FloatTensor'.
        if not args and not kwargs:
            return plain_type(self).replace("torch.", "torch.cuda.", 1)
        return plain_type(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = _nothing()
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _install_collectives() -> None:
    """What NCCL takes and gloo does not: sizes as tensors, and parts of unequal size.

    megatron-core's MoE dispatcher uses both, the second with expert tensor parallelism.
    """
    plain_exchange = torch.distributed.all_to_all_single
    plain_gather, plain_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    @functools.wraps(plain_exchange)
    def all_to_all_single(
        output, input, output_split_sizes=None, input_split_sizes=None, *args, **kwargs
    ):
        def ints(sizes):
            return None if sizes is None else [int(size) for size in sizes]

        return plain_exchange(
            output, input, ints(output_split_sizes), ints(input_split_sizes), *args, **kwargs
        )

    @functools.wraps(plain_gather)
    def all_gather(tensor_list, tensor, group=None, async_op=False):
        rows = [part.shape[0] if part.dim() else 0 for part in tensor_list]
        if len(set(rows)) == 1:
            return plain_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in rows]
        plain_gather(gathered, padded, group=group)
        for part, whole, count in zip(tensor_list, gathered, rows, strict=True):
            part.copy_(whole[:count])
        return None

    @functools.wraps(plain_scatter)
    def reduce_scatter(output, input_list, op=torch.distributed.ReduceOp.SUM, group=None, **kwargs):
        rows = [part.shape[0] if part.dim() else 0 for part in input_list]
        if len(set(rows)) == 1:
            return plain_scatter(output, input_list, op=op, group=group, **kwargs)
        whole = torch.cat(input_list)
        torch.distributed.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split(rows)[torch.distributed.get_rank(group)])
        return None

    torch.distributed.all_to_all_single = all_to_all_single
    torch.distributed.all_gather = all_gather
    torch.distributed.reduce_scatter = reduce_scatter


def _give_storage(target: torch.Tensor, source: torch.Tensor) -> None:
    """Put `source`'s data into the emptied storage of `target`, which autograd has saved.

    On storages, so that no version counter moves; megatron-core's own shares instead of copying.
    """
    storage, given = target.untyped_storage(), source.untyped_storage()
    storage.resize_(given.nbytes())
    storage.copy_(given)


def _uncompiled(model=None, **options):
    """A stand-in for torch.compile, as decorator with or without options."""
    return model if model is not None else lambda function: function


class _CpuGeneratorIsMeant(logging.Filter):
    """Here the CPU's generator stands for the GPU's, so the warning that it moved is void."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install() -> None:
    """Map `torch.cuda` to the CPU. Raises RuntimeError where a CUDA device exists."""
    if getattr(torch.cuda, "_equilibrium_cpu_adapter", False):
        return
    if torch._C._cuda_getDeviceCount() > 0:
        raise RuntimeError("the CPU adapter is for hosts without a CUDA device; this one has some")
    for name, value in _TRIVIAL.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = _nothing()
    torch.cuda.nvtx.range_pop = _nothing()
    _install_random()
    _install_tensors()
    _install_collectives()
    torch.cuda._equilibrium_cpu_adapter = True
    _install_megatron()


def _install_megatron() -> None:
    """Import megatron-core with its small functions left uncompiled, and mend its RNG setter."""
    if "megatron.core.jit" in sys.modules:
        # It was imported too early, with functions compiled at their first call: run them as is.
        torch.compiler.set_stance("force_eager")
    plain = torch.compile
    # `megatron.core.jit.jit_fuser` is bound to this at import. Compiling those functions costs more
    # than it saves on a CPU, and torch's compiler does not know the names installed above.
    torch.compile = _uncompiled
    try:
        import megatron.core.tensor_parallel.random as mcore_random
    finally:
        torch.compile = plain

    # This one sets the state through the CUDA driver's queue, which a CPU host never runs.
    mcore_random._set_cuda_rng_state = _set_rng_state
    # This one compiles C++ at run time, for which a laptop may have no compiler.
    mcore_random._get_share_storage = lambda: _give_storage
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_CpuGeneratorIsMeant())

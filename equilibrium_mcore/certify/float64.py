"""The training code in float64, in the ranks of a certificate: rounding is then no excuse.

megatron-core and this package compute much in float32 whatever the model's precision: router
scores, the cross-entropy, gradient buffers, logged losses. Inside `in_float64` a run with
`precision: fp32` is float64 throughout: what asks for float32 by name leaves float64 alone, and
what takes torch's default gets float64. Nothing of megatron-core is edited, float32 and bfloat16
tensors behave as before, and all is put back afterwards.

`NarrowOperations` sees what is left: an operation that gives less than float64 is noted by name
and place, so that a cast which nobody thought of fails a certificate instead of blunting it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe import moe_logging
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equilibrium_mcore.models import transformer_config
from equilibrium_mcore.parallel import cpu_adapter

PRECISION = "fp32"  # the setting whose runs are float64 inside
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
# PyTorch and what stands in for parts of it: an operation's place is the nearest frame outside.
_TORCH = (str(Path(torch.__file__).parent), cpu_adapter.__file__, __file__)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Everything of a run with `precision: fp32` in float64, inside. Not to be nested."""
    replaced = _replacements()
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    default = torch.get_default_dtype()
    number_formats = transformer_config.DTYPES
    torch.set_default_dtype(torch.float64)
    number_formats[PRECISION] = torch.float64
    # Figures of the log are summed in tensors that live as long as the process.
    moe_logging.destroy_moe_metrics_tracker()
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        moe_logging.destroy_moe_metrics_tracker()
        number_formats[PRECISION] = torch.float32
        torch.set_default_dtype(default)


def _replacements() -> list[tuple[Any, str, Callable]]:
    """(owner, name, what stands there instead) of all that asks for float32 by name."""
    found: list[tuple[Any, str, Callable]] = [(torch.Tensor, "float", _float(torch.Tensor.float))]
    for owner in (torch, torch.Tensor, torch.nn.functional):
        for name in ("softmax", "log_softmax"):
            found.append((owner, name, _leaving_float64(getattr(owner, name))))
    # It takes the bias of expert choice back to float32 at every call.
    found.append((TopKRouter, "_maintain_float32_expert_bias", lambda self: None))
    return found


def _float(plain: Callable) -> Callable:
    """`Tensor.float`: float64 stays, and what is no floating-point number takes the default."""

    @functools.wraps(plain)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64:
            return self
        if not (self.is_floating_point() or self.is_complex()):
            return self.double()
        return plain(self, *args, **kwargs)

    return wrapper


def _leaving_float64(plain: Callable) -> Callable:
    """The function `plain`, whose `dtype=torch.float32` does not hold for float64 input."""

    @functools.wraps(plain)
    def wrapper(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return plain(input, *args, **kwargs)

    return wrapper


class NarrowOperations(TorchDispatchMode):
    """Notes every operation, forward or backward, that gives float32, bfloat16 or float16.

    `places` maps "operation at file:line" to how often. It sees the thread that enters it, in which
    PyTorch also runs the backward pass of CPU tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = (result,) if isinstance(result, torch.Tensor) else tree_leaves(result)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.dtype in _NARROW:
                place = f"{func.overloadpacket} at {_nearest_place()}"
                self.places[place] = self.places.get(place, 0) + 1
        return result


def _nearest_place() -> str:
    """file:line of the nearest frame that is not PyTorch's."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH):
            parts = Path(name).parts
            return f"{'/'.join(parts[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"

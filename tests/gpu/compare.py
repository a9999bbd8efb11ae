"""Comparing a module with its reference: same weights, same inputs, same output gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equilibrium_mcore.certify.kernels import relative_error, weights
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from equilibrium_mcore.models.specs import Backend
from equilibrium_mcore.models.transformer_config import build_transformer_config
from equilibrium_mcore.parallel import accelerator


def fast_backend() -> Backend:
    """What `training.backend: auto` takes on this host."""
    from equilibrium_mcore.models.provider import choose_backend

    return choose_backend("auto", on_gpu=accelerator.has_cuda())


def transformer_config(model: ModelConfig, precision: str, backend: Backend):
    """megatron-core's config of one rank, for modules of `backend`."""
    training = TrainingConfig(
        sequence_length=64, global_batch_size=1, steps=1, precision=precision, backend=backend.name
    )
    return build_transformer_config(
        model, ParallelismConfig(), training, on_gpu=accelerator.has_cuda()
    )


def assert_equal_function(
    fast: torch.nn.Module,
    reference: torch.nn.Module,
    inputs: list[Tensor],
    *,
    tolerance: float,
    call: Callable[[torch.nn.Module, list[Tensor]], Tensor] | None = None,
) -> None:
    """Output, and gradients of inputs and weights, within `tolerance` (`relative_error`).

    Args:
        inputs: in the fast module's precision; the reference gets them in its own.
        call: how a module is called; by default with `inputs`, keeping its first result.
    """
    call = call or (lambda module, tensors: _first(module(*tensors)))
    wide = next((p.dtype for p in reference.parameters()), torch.float32)
    results = []
    for module, dtype in ((fast, None), (reference, wide)):
        tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        output = call(module, tensors)
        if not results:
            gradient = torch.randn_like(output.float())
        output.backward(gradient.to(output.dtype))
        found = {"output": output}
        found |= {f"gradient of input {i}": x.grad for i, x in enumerate(tensors)}
        for name, parameter in weights(module).items():
            gradient_of = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[f"gradient of {name}"] = gradient_of
        results.append(found)
    got, wanted = results
    assert got.keys() == wanted.keys()
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, f"relative errors above {tolerance}: {bad}"


def _first(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result

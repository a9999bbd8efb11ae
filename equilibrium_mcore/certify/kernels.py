"""The kernels that a GPU run takes against the PyTorch reference, on one device, layer by layer.

Each kind of layer of the run's model is built alone at its real widths, on the run's backend
(Transformer Engine, mamba-ssm's Triton scan, fused attention, FP8) and on the PyTorch backend in
float32, with the same weights. Output and every gradient are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from equilibrium_mcore.certify.verdict import Verdict
from equilibrium_mcore.config.fused import FusedConfig
from equilibrium_mcore.config.pattern import LAYER_KINDS, ByKind, layers_of
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, RunConfig
from equilibrium_mcore.models.provider import build_model
from equilibrium_mcore.parallel import accelerator, process_groups

# How many times as far from float32 as PyTorch's own operations in the same precision a kernel may
# be: it rounds at other places, and Transformer Engine and Triton multiply float32 in tf32.
ROOM = 3.0
# At least so much is allowed: tf32 has 11 bits, bf16 has 8, and products are sums of roundings.
FLOOR = {"fp32": 3e-3, "bf16": 1e-2}
# FP8 has no PyTorch counterpart. Each factor of a product has 3 bits of mantissa forward (up to 6%)
# and 2 backward (up to 12%); a lost gradient or a wrong scale is 1 or more.
FP8 = 0.5
SEQUENCES, LENGTH = 2, 256
KERNELS: ByKind[str] = {
    "mamba": "mixer",
    "mla": "self_attention.core_attention",
    "attention": "self_attention.core_attention",
    "mlp": "mlp.linear_fc1",
    "moe": "mlp.experts",
}
"""Where in a layer its kernel is: the class there names it in the verdict."""


def certify_kernels(
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Verdict]:
    """A verdict per kind of layer and precision; `groups` are those of one rank.

    Precisions: float32, bfloat16, and FP8 where the run trains in it. On a host without a GPU both
    sides are PyTorch's, which shows only that the comparison works.
    """
    verdicts = []
    precisions = ["fp32", "bf16"] + ["fp8"] * (config.training.precision == "fp8")
    for letter in dict.fromkeys(layers_of(config.model.layer_pattern)):
        for precision in precisions:
            progress(f"{LAYER_KINDS[letter]} layer in {precision}")
            verdicts += _compare_layer(config, groups, letter, precision)
    return verdicts


def _compare_layer(
    config: RunConfig, groups: ProcessGroupCollection, letter: str, precision: str
) -> list[Verdict]:
    process_groups.seed_everything(config.training.seed)
    model = _one_layer(config.model, letter)
    wide = _results(model, config, groups, precision="fp32", backend="torch")
    limit = FP8
    if precision != "fp8":
        plain = _results(model, config, groups, precision=precision, backend="torch", like=wide)
        limit = None
    fast = _results(model, config, groups, precision=precision, backend="auto", like=wide)
    verdicts = []
    for what, names in (
        ("output", ["output"]),
        ("gradients", sorted(wide.values.keys() - {"output"})),
    ):
        errors, room = {}, {}
        for name in names:
            errors[name] = relative_error(fast.values.get(name), wide.values[name])
            room[name] = limit or max(
                FLOOR[precision], ROOM * relative_error(plain.values[name], wide.values[name])
            )
        worst = max(names, key=lambda name: errors[name] / room[name])
        title = f"{LAYER_KINDS[letter]} ({fast.kernel}) in {precision}: {what}"
        verdicts.append(Verdict(title, errors[worst], room[worst], worst))
    return verdicts


class _Results:
    """What a model gave, and what it gave it with."""

    def __init__(self, module: torch.nn.Module, values: dict[str, Tensor], kernel: str) -> None:
        self.module, self.values, self.kernel = module, values, kernel


def _one_layer(model: ModelConfig, letter: str) -> ModelConfig:
    """A model of one layer at the real widths, with a small vocabulary."""
    return model.model_copy(
        update={"layer_pattern": letter, "vocab_size": 512, "tie_embeddings": False}
    )


def _results(
    model: ModelConfig,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    precision: str,
    backend: str,
    like: _Results | None = None,
) -> _Results:
    """Logits and gradients of one layer; with the weights of `like`."""
    fused = FusedConfig()
    if backend != "torch":  # but for what needs DDP's buffers, or a loss
        without = {"weight_gradients": False, "cross_entropy": False}
        fused = config.training.fused.model_copy(update=without)
    training = config.training.model_copy(
        update={
            "fused": fused,
            "cuda_graphs": [],
            "precision": precision,
            "backend": backend,
            "sequence_length": LENGTH,
            "micro_batch_size": SEQUENCES,
            "recompute": "none",
        }
    )
    module = build_model(
        model, ParallelismConfig(), training, groups, on_gpu=accelerator.has_cuda()
    ).to(accelerator.device())
    if like is not None:
        give_weights(like.module, module)
    generator = torch.Generator().manual_seed(config.training.seed)
    tokens = torch.randint(0, model.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    tokens = tokens.to(accelerator.device())
    positions = torch.arange(LENGTH, device=tokens.device).expand(SEQUENCES, -1)
    logits = module.train()(tokens, positions, None)
    # A random direction instead of a loss: every logit's gradient counts.
    direction = torch.randn(logits.shape, generator=generator).to(logits.device, logits.dtype)
    logits.backward(direction / logits.numel())
    values = {"output": logits.detach()}
    for name, parameter in weights(module).items():
        gradient = parameter.grad
        values[name] = torch.zeros_like(parameter) if gradient is None else gradient
    kernel = KERNELS[LAYER_KINDS[model.layer_pattern]]
    return _Results(module, values, type(module.decoder.layers[0].get_submodule(kernel)).__name__)


# ---------------------------------------------------------------------- weights of two backends


def relative_error(value: Tensor | None, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in float64; NaN where either has one.

    0 where both are zero throughout; infinite where the reference alone is, or without a value.
    """
    if value is None:
        return float("inf")
    value, reference = value.detach().double(), reference.detach().double()
    if not reference.any():
        return float("inf") if value.any() else 0.0
    return ((value - reference).norm() / reference.norm()).item()


def weights(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by the PyTorch backend's names: grouped experts are numbered like single ones."""
    return {
        re.sub(r"(linear_fc[12])\.weight(\d+)$", r"local_experts.\2.\1.weight", name): parameter
        for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def give_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy all parameters and buffers by name, and cast. Raises ValueError for other names."""
    mine, theirs = weights(source), weights(target)
    if mine.keys() != theirs.keys():
        raise ValueError(f"two backends name weights differently: {mine.keys() ^ theirs.keys()}")
    for name, parameter in theirs.items():
        parameter.copy_(mine[name])
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])

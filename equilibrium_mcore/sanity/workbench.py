"""One rank, one small run: the config as the checks use it, and what is seen while it trains.

Everything is the training code itself (`training.setup`, `training.step`); hooks only look.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from equilibrium_mcore.certify.shrink import shrink_model
from equilibrium_mcore.config.fused import fused_on_any_host
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.config.layout import DIMENSIONS, communication, train_samples
from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.models.parameters import count_parameters
from equilibrium_mcore.optim.parameters import layout_free_names
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.step import train_step

# Larger models are checked on a twin: the ladder takes minutes on a laptop, whatever the run.
LARGEST_MODEL = 8_000_000
TWIN_HIDDEN_SIZE = 128
# Long enough to cross chunk boundaries of the scan, short enough for a CPU.
LONGEST_SEQUENCE = 256
# Building the order of the data of a long run takes minutes; the checks need its start.
MOST_SAMPLES = 200_000
# What the checks read, whatever the run does: some steps of eight, and text to learn by heart.
LEAST_SAMPLES, LEAST_TOKENS = 64, 4096
_ONE_RANK = {**dict.fromkeys(DIMENSIONS, 1), "sequence": False}
_ONE_RANK |= {"world_size": 1, "context_exchange": None}


def sanity_config(
    config: RunConfig, *, folder: Path, made_up_tokens: bool = False
) -> tuple[RunConfig, list[str]]:
    """The run on one rank, small enough to check, and in words what was changed."""
    values = config.model_dump(mode="json")
    changes = [f"one rank, no parallelism (layouts: {command('certify')})", "precision fp32"]
    values["parallelism"].update(communication(config.parallelism), **_ONE_RANK)
    size = count_parameters(config.model).total
    if size > LARGEST_MODEL:
        model = shrink_model(config.model, stages=1, largest=dict.fromkeys(DIMENSIONS, 1))
        model.update(hidden_size=TWIN_HIDDEN_SIZE)
        if not made_up_tokens:  # the run's own data goes through the twin
            model.update({k: values["model"][k] for k in ("vocab_size", "vocab_size_multiple")})
        values["model"] = model
        changes.append(
            f"{config.model.name} ({size:,} parameters) is shrunk to a twin: layers "
            f"{model['layer_pattern']}, hidden size {TWIN_HIDDEN_SIZE}, vocabulary "
            f"{model['vocab_size']:,}"
        )
    length = min(config.training.sequence_length, LONGEST_SEQUENCE)
    if length < config.training.sequence_length:
        changes.append(f"sequences of {length} instead of {config.training.sequence_length}")
    values["data"].update(cache_directory=str(folder / "data_cache"), num_workers=0)
    samples = MOST_SAMPLES if config.training.steps is None else train_samples(config)
    if samples > MOST_SAMPLES:
        samples = MOST_SAMPLES
        if config.data.type == "indexed" and config.data.order == "megatron":
            changes.append(f"the order of the data is made for {samples:,} sequences only")
    least = max(LEAST_SAMPLES, -(-LEAST_TOKENS // length))
    if samples < least:
        changes.append(f"{least:,} sequences instead of the run's {samples:,}, which are too few")
        samples = least
        for source in values["data"]["sources"]:
            source.pop("max_epochs", None)  # it holds for the run, not for the checks
    if config.data.type == "indexed":
        values["data"]["train_samples"] = samples
    elif length < config.training.sequence_length:
        values["data"].update(max_tokens=None, too_long="cut")
        changes.append(f"conversations cut after the last answer that fits into {length} tokens")
    values["training"].update(
        sequence_length=length,
        micro_batch_size=4,
        global_batch_size=8,
        steps=samples // 8,
        epochs=None,
        stop_after_steps=None,
        anomalies=None,  # a check may make one
        left_out=[],
        frozen=[],  # names of the run's own layers; the checks want a gradient everywhere
        precision="fp32",
        recompute="none",
        fused=fused_on_any_host(config.training.fused),
        cuda_graphs=[],
        validation_interval_steps=1,
        validation_batches=2,
    )
    values["output_directory"] = str(folder / "run")
    values["checkpoint"] = {"resume": "never"}
    values["logging"] = {"tensorboard": False}
    return run_from_mapping(_fitting(values)), changes


def varied(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """`config` with some settings of some sections changed, checked again."""
    values = _merged(config.model_dump(mode="json"), sections)
    return run_from_mapping(_fitting(values))


def any_number_of_samples(config: RunConfig) -> dict[str, Any]:
    """The change of `data` after which its order is made for as many steps as there are."""
    return {"train_samples": None} if config.data.type == "indexed" else {"num_workers": 0}


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in it, mapping by mapping."""
    result = dict(values)
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(result.get(key), dict)
        # An empty mapping takes the old one's place: rates of single kinds are set as a whole.
        result[key] = _merged(result[key], change) if both and change else change
    return result


def _fitting(values: dict[str, Any]) -> dict[str, Any]:
    """The schedule fitted to the steps, which must hold its warmup and decay."""
    schedule, steps = values["optimizer"]["schedule"], values["training"]["steps"]
    schedule["warmup_steps"] = min(schedule["warmup_steps"], steps // 4)
    schedule["decay_steps"] = min(schedule["decay_steps"], steps // 4)
    if not schedule["decay_steps"] and schedule["kind"] == "wsd":
        schedule["kind"] = "constant"
    return values


# ------------------------------------------------------------------------------- what is seen


@dataclass
class Observed:
    """What hooks saw over some training steps.

    Attributes:
        losses: mean loss of each step, in nats.
        inputs: what the model was given in each forward pass: input_ids, labels, position_ids.
        outputs: what it returned: losses per token, (batch, sequence).
        gradient_sums: by parameter, the sum over steps of the gradient's absolute values, summed
            within each row (first dimension).
        non_finite: parameters with a gradient that was not finite.
        frozen: parameters that ask for no gradient.
        unmoved: parameters with a gradient that all steps left as they were.
        memberships: how often an optimizer holds each parameter in its groups.
        tokens_of_experts: by 0-based layer, the tokens that each expert was given.
    """

    losses: list[float] = field(default_factory=list)
    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradient_sums: dict[str, Tensor] = field(default_factory=dict)
    non_finite: set[str] = field(default_factory=set)
    frozen: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)
    memberships: dict[str, int] = field(default_factory=dict)
    tokens_of_experts: dict[int, Tensor] = field(default_factory=dict)

    def expert_tokens(self, name: str) -> int | None:
        """Tokens that reached the expert which parameter `name` belongs to; None for another."""
        found = re.search(r"layers\.(\d+)\..*experts\..*?(?:local_experts\.|weight)(\d+)", name)
        if found is None or ".shared_experts." in name:
            return None
        return int(self.tokens_of_experts[int(found[1])][int(found[2])])


def observe(run: Run, *, steps: int) -> Observed:
    """Train `steps` steps and look."""
    seen = Observed()
    named = dict(layout_free_names(run.chunks[0]))
    seen.frozen = [name for name, tensor in named.items() if not tensor.requires_grad]
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    with _watching(run, named, seen):
        for _ in range(steps):
            seen.losses.append(train_step(run).loss)
    seen.unmoved = [
        name
        for name, sums in seen.gradient_sums.items()
        if sums.any() and torch.equal(before[name], named[name])
    ]
    return seen


@contextlib.contextmanager
def _watching(run: Run, named: dict[str, Tensor], seen: Observed) -> Iterator[None]:
    chunk, plain_step = run.chunks[0], run.optimizer.step
    names = {id(p.main): p.name for p in run.optimizer.parameters if p.main is not None}
    stepped: dict[int, Counter[str]] = {}

    def on_forward(module, args, kwargs, output) -> None:
        seen.inputs.append({k: v for k, v in kwargs.items() if isinstance(v, Tensor)})
        seen.outputs.append(output.detach())

    def on_route(router: TopKRouter, args, output) -> None:
        load = output[1].reshape(-1, output[1].shape[-1]).sum(0).cpu()
        layer = router.layer_number - 1
        seen.tokens_of_experts[layer] = seen.tokens_of_experts.get(layer, 0) + load

    def before_update(optimizer, args, kwargs) -> None:
        members = (p for group in optimizer.param_groups for p in group["params"])
        stepped[id(optimizer)] = Counter(
            names.get(id(p), f"unknown {tuple(p.shape)}") for p in members
        )

    def step():
        for name, tensor in named.items():
            gradient = getattr(tensor, "main_grad", None)
            if gradient is None:
                continue
            if not gradient.isfinite().all():
                seen.non_finite.add(name)
            rows = gradient.abs().flatten(1).sum(1) if gradient.dim() > 1 else gradient.abs()
            seen.gradient_sums[name] = seen.gradient_sums.get(name, 0) + rows.double().cpu()
        return plain_step()

    hooks = [chunk.register_forward_hook(on_forward, with_kwargs=True)]
    hooks += [
        module.register_forward_hook(on_route)
        for module in chunk.modules()
        if isinstance(module, TopKRouter)
    ]
    hooks.append(register_optimizer_step_pre_hook(before_update))
    run.optimizer.step = step
    try:
        yield
    finally:
        del run.optimizer.step  # the method of the class again
        for hook in hooks:
            hook.remove()
        total = sum(stepped.values(), Counter())
        seen.memberships = {name: total.pop(name, 0) for name in named} | dict(total)


def grouped_by_layer(names: list[str]) -> dict[str, list[str]]:
    """Names with the layer's number taken out, to report `layers.*.mixer.D` once."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[re.sub(r"\.layers\.\d+\.", ".layers.*.", name)].append(name)
    return kinds


def to_device(value: Tensor) -> Tensor:
    """The tensor on the device that the model computes on."""
    return value.to(accelerator.device())

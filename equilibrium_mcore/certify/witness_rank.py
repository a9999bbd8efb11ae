"""What the witness's one rank does: the run trained here, and once more by the plain loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from equilibrium_mcore.certify.float64 import in_float64
from equilibrium_mcore.certify.plain_loop import train_plainly
from equilibrium_mcore.certify.tokens import made_up_datasets
from equilibrium_mcore.certify.whole import pieces_of
from equilibrium_mcore.checkpoint.pieces import assemble
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.hugging_face.config_json import config_values
from equilibrium_mcore.hugging_face.mapping import ParamMapping, plan
from equilibrium_mcore.hugging_face.weights import to_hugging_face
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training.setup import Run, setup, teardown
from equilibrium_mcore.training.step import train_step

FILE = "witness.pt"


@dataclass
class Ours:
    """What training here saw, by Hugging Face names, in float64."""

    dtype: torch.dtype  # that it trained in
    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train_both(
    rank_info: RankInfo, *, config: RunConfig, folder: Path, prepare: Callable[[], None] | None
) -> None:
    """Train both ways from the same weights on the same batches; `folder`/FILE holds both traces.

    `prepare` runs before anything is built.
    """
    if prepare is not None:
        prepare()
    with in_float64():
        _train_both(rank_info, config, folder)


def _train_both(rank_info: RankInfo, config: RunConfig, folder: Path) -> None:
    run = setup(config, rank_info, datasets=made_up_datasets(config))
    _make_rough(run)
    rows = plan(config.model, _tensors(run).keys())
    model = _transformers_model(run, rows)
    ours = _train_here(run, rows)
    moe = config.model.moe
    theirs = train_plainly(
        model,
        _batches(run),
        optimizer=config.optimizer,
        objective=config.objective,
        bias_update_rate=moe.expert_bias_update_rate if moe and moe.expert_bias else None,
    )
    seen = {"ours": dataclasses.asdict(ours), "theirs": dataclasses.asdict(theirs)}
    with naming(folder / FILE):
        torch.save(seen, folder / FILE)
    teardown(run)


@torch.no_grad()
def _make_rough(run: Run) -> None:
    """Norms, biases and Mamba's numbers away from their 0s and 1s, in which a fault could hide."""
    generator = torch.Generator().manual_seed(run.config.training.seed)

    def roughen(tensor: Tensor) -> None:
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))

    for parameter in run.optimizer.parameters:
        if parameter.model.dim() == 1:
            roughen(parameter.model)
    for bias in _expert_biases(run).values():
        roughen(bias)
    run.optimizer.refresh_main_weights()


def _expert_biases(run: Run) -> dict[str, Tensor]:
    (chunk,) = run.chunks
    return {
        name.removeprefix("module."): buffer
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    }


def _tensors(run: Run) -> dict[str, Tensor]:
    """The model's tensors by their names in a checkpoint."""
    weights = _whole(run, {p.name: p.model for p in run.optimizer.parameters})
    return weights | _expert_biases(run)


def _whole(run: Run, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole.data for name, whole in assemble(pieces_of(run, tensors)).items()}


def _exported(run: Run, rows: list[ParamMapping], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies by Hugging Face names, of the rows whose tensors are there."""
    there = [row for row in rows if set(row.megatron) <= tensors.keys()]
    converted = to_hugging_face(tensors.__getitem__, there, run.config.model)
    return {name: tensor.detach().double() for _, name, tensor in converted}


def _transformers_model(run: Run, rows: list[ParamMapping]) -> torch.nn.Module:
    """The exported class with the run's weights, in float64."""
    from transformers.utils import logging

    from equilibrium_mcore.hugging_face.model_code.configuration_equilibrium import (
        EquilibriumConfig,
    )
    from equilibrium_mcore.hugging_face.model_code.modeling_equilibrium import (
        EquilibriumForCausalLM,
    )

    logging.set_verbosity_error()  # that it takes its PyTorch kernels is what is wanted
    config = run.config
    values = config_values(config.model, sequence_length=config.training.sequence_length)
    # The plainest code that transformers has for attention and for experts.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = EquilibriumForCausalLM(EquilibriumConfig(**values, **plain))
    weights = _exported(run, rows, _tensors(run))
    if config.model.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.tie_weights()
    model.double()  # afterwards, so that tables of angles are those of a float32 model
    model.load_state_dict(weights)
    return model


def _train_here(run: Run, rows: list[ParamMapping]) -> Ours:
    ours = Ours(run.optimizer.parameters[0].model.dtype, start=_exported(run, rows, _tensors(run)))
    update = run.optimizer.step

    def noted():
        if not ours.gradients:
            gradients = {p.name: p.gradient for p in run.optimizer.parameters}
            ours.gradients = _exported(run, rows, _whole(run, gradients))
        return update()

    run.optimizer.step = noted
    for _ in range(run.config.training.steps):
        outcome = train_step(run)
        ours.loss.append(outcome.loss)
        ours.gradient_norm.append(outcome.gradient_norm)
    ours.weights = _exported(run, rows, _tensors(run))
    return ours


def _batches(run: Run) -> Iterator[dict[str, Tensor]]:
    """The global batches of the run, one after the other."""
    size = run.config.training.global_batch_size
    for step in range(run.config.training.steps):
        samples = [run.datasets.train[step * size + index] for index in range(size)]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

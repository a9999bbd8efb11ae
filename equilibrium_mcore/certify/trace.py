"""What one layout does with the twin, written down by its ranks for comparison.

Everything is the training code itself (`training.setup`, `training.step`); hooks only look.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from equilibrium_mcore.certify.balance import balancing_gradients
from equilibrium_mcore.certify.float64 import NarrowOperations, in_float64
from equilibrium_mcore.certify.generated import generated
from equilibrium_mcore.certify.routing import Notes, Routing, RoutingWatch, whole_routing
from equilibrium_mcore.certify.tokens import (
    made_up_datasets,
    made_up_experience,
    made_up_reference,
    made_up_teacher,
)
from equilibrium_mcore.certify.updates import update_from_given_gradients
from equilibrium_mcore.certify.whole import pieces_of
from equilibrium_mcore.checkpoint.pieces import FullTensor, TensorShard, assemble, whole_shard
from equilibrium_mcore.checkpoint.save import save_checkpoint
from equilibrium_mcore.config.heads import has_output
from equilibrium_mcore.config.objectives import REFERENCED, DistillationConfig
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training.setup import Run, setup, teardown
from equilibrium_mcore.training.step import train_step


@dataclass
class RankTrace:
    """What one rank saw."""

    loss: list[float] = field(default_factory=list)
    aux_loss: list[float | None] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    gradients: list[TensorShard] = field(default_factory=list)  # of the first step
    weights: dict[int, list[TensorShard]] = field(default_factory=dict)  # after so many steps
    update: list[TensorShard] = field(default_factory=list)  # of given gradients, in float64
    state: dict[str, list[TensorShard]] = field(default_factory=dict)  # optimizer state at the end
    balancing: dict[str, list[TensorShard]] = field(default_factory=dict)  # `balance.py`
    choices: Notes = field(default_factory=dict)
    narrow: dict[str, int] = field(default_factory=dict)  # what was not float64, and how often
    generated: dict = field(default_factory=dict)  # `generated.py`


@dataclass
class Trace:
    """What a layout did, whole."""

    loss: list[float]
    aux_loss: list[float | None]
    gradient_norm: list[float]
    gradients: dict[str, FullTensor]
    weights: dict[int, dict[str, FullTensor]]
    update: dict[str, FullTensor]
    state: dict[str, dict[str, FullTensor]]
    choices: dict[tuple[int, int], Routing]  # by (step, layer)
    narrow: dict[str, int]  # what was not float64, over all ranks
    balancing: dict[str, dict[str, FullTensor]] = field(default_factory=dict)  # by objective
    generated: dict = field(default_factory=dict)  # the same on every rank


def trace_rank(
    rank_info: RankInfo,
    config: RunConfig,
    folder: Path,
    *,
    steps: int,
    sharp: bool = True,
    save_first: bool = False,
    save_last: bool = False,
    gradients_from: Path | None = None,
) -> None:
    """Run the twin in one rank and write its trace to `folder`. Collective.

    `sharp` is in float64 throughout; else in the precision that `config` says. `save_first` saves a
    checkpoint before the first step, `save_last` one after the last. From the weights of the
    checkpoint `gradients_from` gradients are made for float64 updates, at the end, since the run is
    of no use then.
    """
    with in_float64() if sharp else contextlib.nullcontext():
        trace = _trace(
            rank_info,
            config,
            steps=steps,
            sharp=sharp,
            save_first=save_first,
            save_last=save_last,
            gradients_from=gradients_from,
        )
    with naming(_file(folder, rank_info)):
        torch.save(trace, _file(folder, rank_info))


def _trace(
    rank_info: RankInfo,
    config: RunConfig,
    *,
    steps: int,
    sharp: bool,
    save_first: bool,
    save_last: bool,
    gradients_from: Path | None,
) -> dict:
    """The rank's trace as plain values."""
    run = setup(config, rank_info, datasets=made_up_datasets(config))
    if isinstance(config.objective, REFERENCED):
        run.prepare = made_up_reference  # a model's would route tokens, too
    elif isinstance(config.objective, DistillationConfig):
        run.prepare = made_up_teacher
    elif isinstance(config.objective, PolicyConfig):
        run.prepare = made_up_experience
    trace = RankTrace()
    if save_first:
        _save(run)
    if steps == 0:  # only what was loaded
        trace.weights[0] = _weights(run)
        trace.state = _state(run)
    else:
        if sharp and has_output(config.model):
            trace.generated = generated(run)
        with NarrowOperations() if sharp else contextlib.nullcontext() as narrow:
            _train(run, trace, steps)
        trace.narrow = narrow.places if sharp else {}
        if sharp:
            trace.balancing = balancing_gradients(run)
    if save_last:
        _save(run)
    if gradients_from is not None:
        trace.update = update_from_given_gradients(run, gradients_from)
    if sharp:
        trace.narrow |= _narrow_tensors(run)
    teardown(run)
    return dataclasses.asdict(trace)


def read_trace(folder: Path, world_size: int) -> Trace:
    """Put the ranks' traces together."""
    ranks = [
        torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(world_size)
    ]
    first = ranks[0]

    def whole(get) -> dict[str, FullTensor]:
        return assemble(TensorShard(**piece) for rank in ranks for piece in get(rank))

    narrow: dict[str, int] = defaultdict(int)
    for rank in ranks:
        for what, count in rank["narrow"].items():
            narrow[what] += count
    return Trace(
        loss=first["loss"],
        aux_loss=first["aux_loss"],
        gradient_norm=first["gradient_norm"],
        gradients=whole(lambda rank: rank["gradients"]),
        weights={step: whole(lambda rank, s=step: rank["weights"][s]) for step in first["weights"]},
        update=whole(lambda rank: rank["update"]),
        state={key: whole(lambda rank, k=key: rank["state"].get(k, [])) for key in _keys(ranks)},
        balancing={
            name: whole(lambda rank, n=name: rank["balancing"][n]) for name in first["balancing"]
        },
        choices=whole_routing([rank["choices"] for rank in ranks]),
        narrow=dict(narrow),
        generated=first["generated"],
    )


def _keys(ranks: list[dict]) -> list[str]:
    return sorted({key for rank in ranks for key in rank["state"]})


def _file(folder: Path, rank_info: RankInfo) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank_{rank_info.rank}.pt"


def _train(run: Run, trace: RankTrace, steps: int) -> None:
    watch = RoutingWatch(run)
    update = run.optimizer.step

    def step_with_gradients_noted():
        trace.gradients = pieces_of(run, {p.name: p.gradient for p in run.optimizer.parameters})
        run.optimizer.step = update
        return update()

    run.optimizer.step = step_with_gradients_noted
    trace.weights[0] = _weights(run)
    for step in range(1, steps + 1):
        outcome = train_step(run)
        trace.loss.append(outcome.loss)
        trace.aux_loss.append(outcome.aux_loss)
        trace.gradient_norm.append(outcome.gradient_norm)
        if step in (1, steps):
            trace.weights[step] = _weights(run)
    trace.choices = {key: list(parts) for key, parts in watch.notes.items()}
    trace.state = _state(run)


def _weights(run: Run) -> list[TensorShard]:
    """Parameters, and the biases by which routers balance their experts, which are none."""
    biases = [
        whole_shard(f"decoder.layers.{router.layer_number - 1}.mlp.router.expert_bias", bias)
        for chunk in run.chunks
        for router in chunk.modules()
        if isinstance(router, TopKRouter) and (bias := router.expert_bias) is not None
    ]
    return pieces_of(run, {p.name: p.model for p in run.optimizer.parameters}) + biases


def _narrow_tensors(run: Run) -> dict[str, int]:
    """What of this rank's model, gradients and optimizer is kept in less than float64."""
    tensors: dict[str, Tensor] = {}
    for parameter in run.optimizer.parameters:
        tensors[parameter.name] = parameter.model
        tensors[f"the gradient of {parameter.name}"] = parameter.gradient
        if parameter.is_owned:
            state = run.optimizer.state_of(parameter) | run.optimizer.whole_state_of(parameter)
            tensors |= {f"{key} of {parameter.name}": value for key, value in state.items()}
    for chunk in run.chunks:
        tensors |= dict(chunk.named_buffers())
    return {
        f"{name}, kept in {tensor.dtype}": 1
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dtype != torch.float64
    }


def _state(run: Run) -> dict[str, list[TensorShard]]:
    """Optimizer state as its owners hold it: of the parameter's shape, and of its whole maps."""
    run.optimizer.init_state()
    by_key: dict[str, dict[str, Tensor]] = defaultdict(dict)
    pieces: dict[str, list[TensorShard]] = defaultdict(list)
    for parameter in run.optimizer.parameters:
        if parameter.is_owned:
            for key, value in run.optimizer.state_of(parameter).items():
                if value.shape == parameter.model.shape:
                    by_key[key][parameter.name] = value
            for key, value in run.optimizer.whole_state_of(parameter).items():
                state, _, part = key.partition(".")
                pieces[state].append(whole_shard(f"{parameter.name}.{part}", value))
    return pieces | {key: pieces_of(run, values) for key, values in by_key.items()}


def _save(run: Run) -> None:
    save_checkpoint(
        config=run.config,
        chunks=run.chunks,
        optimizer=run.optimizer,
        progress=dataclasses.asdict(run.progress),
    )

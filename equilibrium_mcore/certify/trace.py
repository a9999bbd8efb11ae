"""What one layout does with the twin, written down by its ranks for comparison.

Everything is the training code itself (`training.setup`, `training.step`); hooks only look.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from equilibrium_mcore.certify.tokens import made_up_datasets
from equilibrium_mcore.certify.updates import update_from_given_gradients
from equilibrium_mcore.certify.whole import Piece, Whole, assemble, pieces_of, whole_piece
from equilibrium_mcore.checkpoint.sharded import save_checkpoint
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import Place
from equilibrium_mcore.training.setup import Run, setup, teardown
from equilibrium_mcore.training.step import rank_batch, train_step

# (layer, micro-batch of the step, sequence of the micro-batch) -> (positions, experts chosen there)
Choices = dict[tuple[int, int, int], tuple[list[int], list[tuple[int, ...]]]]


@dataclass
class RankTrace:
    """What one rank saw."""

    loss: list[float] = field(default_factory=list)
    aux_loss: list[float | None] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    gradients: list[Piece] = field(default_factory=list)  # of the first step
    weights: dict[int, list[Piece]] = field(default_factory=dict)  # after so many steps
    update: list[Piece] = field(default_factory=list)  # of given gradients, in float64
    state: dict[str, list[Piece]] = field(default_factory=dict)  # optimizer state at the end
    choices: Choices = field(default_factory=dict)


@dataclass
class Trace:
    """What a layout did, whole."""

    loss: list[float]
    aux_loss: list[float | None]
    gradient_norm: list[float]
    gradients: dict[str, Whole]
    weights: dict[int, dict[str, Whole]]
    update: dict[str, Whole]
    state: dict[str, dict[str, Whole]]
    choices: dict[tuple[int, int, int], tuple[int, ...]]  # (layer, sample, position) -> experts


def trace_rank(
    place: Place,
    config: RunConfig,
    folder: Path,
    *,
    steps: int,
    save_first: bool = False,
    save_last: bool = False,
    gradients_from: Path | None = None,
) -> None:
    """Run the twin in one rank and write its trace to `folder`. Collective.

    `save_first` saves a checkpoint before the first step, `save_last` one after the last. From the
    weights of the checkpoint `gradients_from` gradients are made for float64 updates, at the end,
    since the run is of no use then.
    """
    run = setup(config, place, datasets=made_up_datasets(config))
    trace = RankTrace()
    if save_first:
        _save(run)
    if steps == 0:  # only what was loaded
        trace.weights[0] = _weights(run)
        trace.state = _state(run)
    else:
        _train(run, trace, steps)
    if save_last:
        _save(run)
    if gradients_from is not None:
        trace.update = update_from_given_gradients(run, gradients_from)
    torch.save(
        dataclasses.asdict(trace) | {"data_rank": run.groups.dp.rank()}, _file(folder, place)
    )
    teardown(run)


def read_trace(folder: Path, world_size: int) -> Trace:
    """Put the ranks' traces together."""
    ranks = [
        torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(world_size)
    ]
    first = ranks[0]

    def whole(get) -> dict[str, Whole]:
        return assemble(Piece(**piece) for rank in ranks for piece in get(rank))

    choices: dict[tuple[int, int, int], tuple[int, ...]] = {}
    data_ranks = 1 + max(rank["data_rank"] for rank in ranks)
    for rank in ranks:
        for (layer, micro_batch, _), (positions, chosen) in rank["choices"].items():
            sample = micro_batch * data_ranks + rank["data_rank"]
            for position, experts in zip(positions, chosen, strict=True):
                choices[layer, sample, position] = experts
    return Trace(
        loss=first["loss"],
        aux_loss=first["aux_loss"],
        gradient_norm=first["gradient_norm"],
        gradients=whole(lambda rank: rank["gradients"]),
        weights={step: whole(lambda rank, s=step: rank["weights"][s]) for step in first["weights"]},
        update=whole(lambda rank: rank["update"]),
        state={key: whole(lambda rank, k=key: rank["state"].get(k, [])) for key in _keys(ranks)},
        choices=choices,
    )


def _keys(ranks: list[dict]) -> list[str]:
    return sorted({key for rank in ranks for key in rank["state"]})


def _file(folder: Path, place: Place) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank_{place.rank}.pt"


def _train(run: Run, trace: RankTrace, steps: int) -> None:
    watching = _watch_routers(run, trace)
    update = run.optimizer.step

    def step_with_gradients_noted():
        trace.gradients = pieces_of(run, {p.name: p.gradient for p in run.optimizer.parameters})
        for hook in watching:
            hook.remove()
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
    trace.state = _state(run)


def _weights(run: Run) -> list[Piece]:
    return pieces_of(run, {p.name: p.model for p in run.optimizer.parameters})


def _state(run: Run) -> dict[str, list[Piece]]:
    """Optimizer state as its owners hold it: of the parameter's shape, and of its whole maps."""
    run.optimizer.init_state()
    by_key: dict[str, dict[str, Tensor]] = defaultdict(dict)
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for parameter in run.optimizer.parameters:
        if parameter.is_owned:
            for key, value in run.optimizer.state_of(parameter).items():
                if value.shape == parameter.model.shape:
                    by_key[key][parameter.name] = value
            for key, value in run.optimizer.whole_state_of(parameter).items():
                state, _, part = key.partition(".")
                pieces[state].append(whole_piece(f"{parameter.name}.{part}", value))
    return pieces | {key: pieces_of(run, values) for key, values in by_key.items()}


def _watch_routers(run: Run, trace: RankTrace) -> list:
    """Hooks that note which experts every token goes to, in the first step."""
    seen: dict[int, int] = defaultdict(int)

    def note(router: TopKRouter, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        layer, micro_batch = router.layer_number, seen[router.layer_number]
        seen[router.layer_number] += 1
        positions = _positions(run, micro_batch)
        chosen = output[1].reshape(len(positions), -1)
        experts = [tuple(row.nonzero().flatten().tolist()) for row in chosen]
        trace.choices[layer, micro_batch, 0] = (positions.tolist(), experts)

    return [
        module.register_forward_hook(note)
        for chunk in run.chunks
        for module in chunk.modules()
        if isinstance(module, TopKRouter)
    ]


def _positions(run: Run, micro_batch: int) -> Tensor:
    """Which places of the sequence this rank's router sees in a micro-batch of the first step."""
    sample = run.datasets.train[micro_batch * run.data_parallel_size + run.groups.dp.rank()]
    batch = {name: value.unsqueeze(0) for name, value in sample.items()}
    run.objective.weigh(batch)
    batch["tokens"] = torch.arange(run.config.training.sequence_length).unsqueeze(0)
    places = rank_batch(batch, run)[0]["tokens"][0]
    if run.config.parallelism.sequence:
        places = places.chunk(run.groups.tp.size())[run.groups.tp.rank()]
    return places


def _save(run: Run) -> None:
    save_checkpoint(
        config=run.config,
        chunks=run.chunks,
        optimizer=run.optimizer,
        groups=run.groups,
        progress=dataclasses.asdict(run.progress),
    )

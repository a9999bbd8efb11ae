"""Which experts every token goes to, in every step, by its place in the global batch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from equilibrium_mcore.training.schedule import rank_batch
from equilibrium_mcore.training.setup import Run

# (step, layer), both from 1 -> places, experts chosen there, and how clear each choice was
Notes = dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]]


@dataclass
class Routing:
    """The choices of one MoE layer in one step; place p is position p % length of a sequence."""

    chosen: Tensor  # (places, experts), bool
    # (places,): how far the last expert chosen and the first one left out lie apart, relative to
    # the largest score; infinite where no expert was left out.
    margin: Tensor


class RoutingWatch:
    """Notes the choices of this rank's routers from now on; it only looks."""

    def __init__(self, run: Run) -> None:
        self.notes: Notes = defaultdict(list)
        self._run = run
        self._places: dict[int, Tensor] = {}
        for chunk in run.chunks:
            forward = _Forward()
            chunk.register_forward_pre_hook(lambda *_, f=forward: f.enter())
            chunk.register_forward_hook(lambda *_, f=forward: f.leave())
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(partial(self._note, forward))

    @torch.no_grad()
    def _note(self, forward: _Forward, router: TopKRouter, inputs: tuple, output: tuple) -> None:
        if not forward.runs:  # activations computed again in the backward pass
            return
        step = forward.micro_batch // self._run.micro_batches + 1
        places = self._places_of(forward.micro_batch)
        chosen = output[1].reshape(len(places), -1).clone()
        self.notes[step, router.layer_number].append((places, chosen, margin(router, inputs[0])))

    def _places_of(self, micro_batch: int) -> Tensor:
        """Which places of the global batch this rank's routers see in a micro-batch, in order."""
        if micro_batch not in self._places:
            self._places = {micro_batch: places_of(self._run, micro_batch)}
        return self._places[micro_batch]


class _Forward:
    """Where a model chunk's forward pass stands."""

    micro_batch = -1  # since the start of the run
    runs = False

    def enter(self) -> None:
        self.micro_batch += 1
        self.runs = True

    def leave(self) -> None:
        self.runs = False


def places_of(run: Run, micro_batch: int) -> Tensor:
    """(tokens of this rank,): sequence of the global batch * sequence_length + position."""
    training, layout = run.config.training, run.config.parallelism
    size, length = training.micro_batch_size, training.sequence_length
    first = (micro_batch * run.data_parallel_size + run.groups.dp.rank()) * size
    samples = [run.datasets.train[index] for index in range(first, first + size)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    row = first % training.global_batch_size
    batch["tokens"] = torch.arange(row * length, (row + size) * length).view(size, length)
    places = rank_batch(batch, run)[0]["tokens"].T  # as routers see them: (sequence, batch)
    if layout.sequence:
        places = places.chunk(run.groups.tp.size())[run.groups.tp.rank()]
    return places.flatten()


def margin(router: TopKRouter, hidden: Tensor) -> Tensor:
    """(tokens,): `Routing.margin` of the choices that `router` makes for `hidden`.

    The balancing loss counts choices by the scores without the bias; the closer border decides.
    """
    logits = router.gating(hidden).flatten(0, -2)
    scores = logits
    if router.score_function == "sigmoid":
        scores = logits.sigmoid()
    elif router.config.moe_router_pre_softmax:
        scores = logits.softmax(-1)
    found = _gap(scores, router.topk)
    if router.expert_bias is not None:
        found = torch.minimum(found, _gap(scores + router.expert_bias, router.topk))
    return found


def _gap(scores: Tensor, top_k: int) -> Tensor:
    if top_k == scores.size(-1):
        return torch.full(scores.shape[:-1], torch.inf, dtype=scores.dtype)
    best = scores.topk(top_k + 1, dim=-1).values
    return (best[:, -2] - best[:, -1]) / scores.abs().amax(-1)


def whole_routing(ranks: list[Notes]) -> dict[tuple[int, int], Routing]:
    """The ranks' notes put together. Raises ValueError where no rank saw a place."""
    together: Notes = defaultdict(list)
    for notes in ranks:
        for key, parts in notes.items():
            together[key] += parts
    found = {}
    for key, parts in sorted(together.items()):
        places, chosen, margins = (torch.cat(column) for column in zip(*parts, strict=True))
        count = int(places.max()) + 1
        if len(places.unique()) != count:
            raise ValueError(f"step {key[0]}, layer {key[1]}: no rank routed some places")
        whole = Routing(chosen.new_zeros(count, chosen.size(1)), margins.new_zeros(count))
        whole.chosen[places], whole.margin[places] = chosen, margins
        found[key] = whole
    return found

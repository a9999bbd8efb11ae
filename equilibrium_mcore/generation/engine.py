"""New tokens by the modules that train: all ranks of the world step together, in any layout.

One step is a forward pass of one token per row through megatron-core's schedule, so tensor,
sequence, expert and pipeline parallelism are those of training and no weight moves. Context ranks
are data ranks here: each has rows of its own. The prompts, without their last tokens, are prefilled
in packs; every token is drawn by a step. The loop ends when no row of the world is unfinished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from equilibrium_mcore.config.layout import virtual_stages
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, RunConfig
from equilibrium_mcore.generation.interface import Request, Rollout, Sampling
from equilibrium_mcore.generation.rows import Group, Pack, Wave, plan
from equilibrium_mcore.generation.sampling import Drawn, draw, row_seeds
from equilibrium_mcore.models.decode.state import DecodeState, Prefill, Step, prefill
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.object_group import object_group

ROWS_AT_ONCE = 64
TOKENS_AT_ONCE = 4096


class LaidOut(Protocol):
    """A model on its ranks, as `training.setup.Run` has it."""

    chunks: list[torch.nn.Module]
    groups: ProcessGroupCollection
    config: RunConfig


class OwnEngine:
    """Answers requests by a run's chunks, whatever their weights and adapters are at the time.

    Args:
        chunks: this rank's, wrapped or bare; every rank makes its engine and asks it together.
        model, layout: the config of both.
        rows_at_once: rows of a data rank that are continued together; their states are held.
        tokens_at_once: tokens of a pack of prompts.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: ProcessGroupCollection,
        *,
        model: ModelConfig,
        layout: ParallelismConfig,
        rows_at_once: int = ROWS_AT_ONCE,
        tokens_at_once: int = TOKENS_AT_ONCE,
    ) -> None:
        for name, value in (("rows_at_once", rows_at_once), ("tokens_at_once", tokens_at_once)):
            if value < 1:
                raise ValueError(f"{name}={value}: it is 1 or more")
        self.chunks, self.groups = list(chunks), groups
        self.model, self.layout = model, layout
        self.rows_at_once, self.tokens_at_once = rows_at_once, tokens_at_once
        self.device = accelerator.device()

    @classmethod
    def of(cls, run: LaidOut, **sizes: int) -> OwnEngine:
        """The engine of a run's chunks; `sizes` are `rows_at_once` and `tokens_at_once`."""
        model, layout = run.config.model, run.config.parallelism
        return cls(run.chunks, run.groups, model=model, layout=layout, **sizes)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, version: int = 0
    ) -> list[Rollout]:
        """One rollout for each request, in their order, whatever the layout. Collective.

        Every rank asks the same and gets all answers. Weights, random states and the experts' bias
        are those from before. Raises ValueError for ids that are no token, an empty prompt and
        settings that nothing can be drawn with.
        """
        self._check(requests, sampling)
        if not requests:
            return []
        answers = _Answers(requests, sampling)
        waves = plan(
            requests,
            ranks=self.groups.dp_cp.size(),
            groups=self.layout.pipeline,
            rows_at_once=self.rows_at_once,
            tokens_at_once=self.tokens_at_once,
            multiple=self.layout.tensor if self.layout.sequence else 1,
            max_new_tokens=sampling.max_new_tokens,
        )
        with _evaluating(self.chunks):
            for wave in waves:
                self._continue(wave, answers)
        one_of_copies = self.groups.tp.rank() == 0 and self.groups.pp.rank() == 0
        return answers.of_all(counts=one_of_copies, version=version)

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        size = self.model.vocab_size
        for number, request in enumerate(requests):
            ids = request.prompt.ids
            if not len(ids):
                raise ValueError(f"request {number}: its prompt is empty, and a token follows one")
            if ids.min() < 0 or ids.max() >= size:
                raise ValueError(
                    f"request {number}: its prompt has ids from {ids.min()} to {ids.max()}, but "
                    f"tokens are 0 to {size - 1}"
                )
        check_sampling(sampling, vocab_size=size)

    def _continue(self, wave: Wave, answers: _Answers) -> None:
        """Every row of the wave, to its end."""
        mine = wave.groups[self.groups.dp_cp.rank()]
        lanes = [_Lane(group, wave, answers, self.device) for group in mine]
        if wave.packs:
            self._prefill(wave, lanes)
        for lane in lanes:
            lane.begin_steps()
        for _ in range(answers.sampling.max_new_tokens):
            drawn = self._step(lanes, answers.sampling)
            for lane, (ids, logprobs, support) in zip(lanes, drawn, strict=True):
                lane.take(ids, logprobs, support)
            if not self._unfinished(lanes):
                break

    def _unfinished(self, lanes: list[_Lane]) -> bool:
        """Whether a row of the world is."""
        here = torch.tensor([sum(lane.unfinished for lane in lanes)], device=self.device)
        torch.distributed.all_reduce(here, op=torch.distributed.ReduceOp.MAX)
        return bool(here.item())

    def _prefill(self, wave: Wave, lanes: list[_Lane]) -> None:
        passes = [lane.pass_of_pack(number) for number in range(wave.packs) for lane in lanes]
        with _without_logits(self.chunks):
            self._run(passes, wave.pack_tokens, lambda output, work: output.new_zeros(0))

    def _step(
        self, lanes: list[_Lane], sampling: Sampling
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """A token of every row of every lane: ids, log-probabilities and support."""
        drawn: list[Drawn] = self._run(
            [lane.pass_of_step() for lane in lanes],
            lanes[0].state.rows,
            partial(self._draw, sampling=sampling),
        )
        ids, logprobs, support = self._to_all_stages(drawn, lanes, sampling)
        return [
            (ids[i], logprobs[i], None if support is None else support[i])
            for i in range(len(lanes))
        ]

    def _draw(self, logits: Tensor, work: _Pass, *, sampling: Sampling) -> Drawn:
        return draw(
            logits[0],
            sampling=sampling,
            seeds_R=work.seeds,
            positions_R=work.places,
            vocab_size=self.model.vocab_size,
            tp_group=self.groups.tp,
        )

    def _to_all_stages(
        self, drawn: list[Drawn], lanes: list[_Lane], sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What the last pipeline stage drew, on every stage's host: each [lanes, R, ...]."""
        pp, shape = self.groups.pp, (len(lanes), lanes[0].state.rows)
        restricted = sampling.temperature > 0 and (sampling.top_k or sampling.top_p < 1)
        if drawn:
            both = torch.stack([torch.stack([d.ids.double(), d.logprobs.double()]) for d in drawn])
        else:
            both = torch.empty(shape[0], 2, shape[1], dtype=torch.float64, device=self.device)
        tensors = [both]
        if restricted:
            if drawn:
                tensors.append(torch.stack([d.support for d in drawn]).to(torch.uint8))
            else:
                width = self.model.padded_vocab_size
                tensors.append(torch.empty(*shape, width, dtype=torch.uint8, device=self.device))
        if pp.size() > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, group=pp, group_src=pp.size() - 1)
        ids, logprobs = both.cpu().numpy().swapaxes(0, 1)
        support = tensors[1].cpu().numpy().astype(bool) if restricted else None
        return ids.astype(np.int64), logprobs, support

    def _run(
        self,
        passes: list[_Pass],
        length: int,
        of_output: Callable[[Tensor, _Pass], Any],
    ) -> list[Any]:
        """The passes through megatron-core's schedule; what the last stage makes of each."""
        layout, chunks = self.layout, self.chunks
        schedule = get_forward_backward_func(
            pp_size=layout.pipeline, vp_size=virtual_stages(layout)
        )
        iterators = [iter(passes) for _ in chunks]
        return schedule(
            forward_step_func=partial(_forward, of_output=of_output),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(passes),
            seq_length=length * layout.context,  # of which the schedule takes a rank's share
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(
                pp_group=self.groups.pp, config=get_model_config(chunks[0])
            ),
            pg_collection=self.groups,
        )


def check_sampling(sampling: Sampling, *, vocab_size: int) -> None:
    """Raises ValueError for settings that nothing can be drawn with."""
    if sampling.temperature < 0:
        raise ValueError(f"temperature={sampling.temperature:g}: it is 0 (the likeliest) or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p={sampling.top_p:g}: it is more than 0, and 1 at most")
    if sampling.top_k < 0:
        raise ValueError(f"top_k={sampling.top_k}: it is 0 (all) or more")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={sampling.max_new_tokens}: it is 1 or more")
    for stop in sampling.stop_ids:
        if not 0 <= stop < vocab_size:
            raise ValueError(f"stop_ids: {stop} is no token, which are 0 to {vocab_size - 1}")


@dataclass
class _Pass:
    """One forward pass: tokens [1, T] of a lane, and what its layers do with them."""

    state: DecodeState
    work: Prefill | Step
    tokens: Tensor
    seeds: Tensor | None = None  # [R], of a step
    places: Tensor | None = None  # [R], in the answers


def _forward(
    iterator: Iterator[_Pass], chunk: torch.nn.Module, *, of_output: Callable[[Tensor, _Pass], Any]
) -> tuple[Tensor, Callable[..., Any]]:
    """megatron-core's forward step."""
    this = next(iterator)
    this.state.work = this.work
    positions = this.work.positions if isinstance(this.work, Prefill) else this.work.positions
    output = chunk(
        input_ids=this.tokens,
        position_ids=positions.unsqueeze(0),
        attention_mask=None,
        inference_context=this.state,
        packed_seq_params=this.state.packed(),
    )
    return output, lambda output, non_loss_data: of_output(output, this)


class _Lane:
    """The rows of one group while they are continued."""

    def __init__(self, group: Group, wave: Wave, answers: _Answers, device: torch.device) -> None:
        self.group, self.wave, self.answers, self.device = group, wave, answers, device
        # Two rows more: one stays empty, for prompts of one token and for rows that only pad; into
        # the other goes the token of a pack without prompts.
        self.state = DecodeState(rows=len(group.prompts) + 2, capacity=wave.capacity)
        requests = [answers.requests[number] for number in group.requests]
        padding = wave.rows - len(requests)
        self.lengths = np.array([len(r.prompt.ids) for r in requests] + [1] * padding)
        self.tokens = np.array([r.prompt.ids[-1] for r in requests] + [0] * padding)
        seeds = np.concatenate([row_seeds(requests, answers.sampling), np.zeros(padding, np.int64)])
        self.seeds = torch.from_numpy(seeds).to(device)
        self.finished = np.array([False] * len(requests) + [True] * padding)
        self.done = 0  # steps

    @property
    def unfinished(self) -> int:
        return int((~self.finished).sum())

    def pass_of_pack(self, number: int) -> _Pass:
        """A pack of the group; one of a token that nobody asked for where it has no more."""
        packs, aside = self.group.packs, len(self.group.prompts) + 1
        pack = packs[number] if number < len(packs) else Pack(aside, ())
        prompts = [self.answers.requests[n].prompt.ids[:-1] for n in pack.prompts]
        prompts = prompts or [np.zeros(1, dtype=np.int32)]
        work = prefill(
            [len(ids) for ids in prompts],
            first=pack.first,
            tokens=self.wave.pack_tokens,
            device=self.device,
        )
        tokens = np.zeros((1, self.wave.pack_tokens), dtype=np.int64)
        real = np.concatenate(prompts)
        tokens[0, : len(real)] = real
        return _Pass(self.state, work, torch.from_numpy(tokens).to(self.device))

    def begin_steps(self) -> None:
        """Give every row the state of its prompt."""
        empty = len(self.group.prompts)
        source = [empty if place < 0 else place for place in self.group.source]
        source += [empty] * (self.wave.rows - len(source))
        self.state.take(torch.tensor(source))

    def pass_of_step(self) -> _Pass:
        positions = self.lengths - 1 + self.done
        return _Pass(
            self.state,
            Step(torch.from_numpy(positions).to(self.device), longest=int(positions.max()) + 1),
            torch.from_numpy(self.tokens[None]).to(self.device),
            seeds=self.seeds,
            places=torch.full_like(self.seeds, self.done),
        )

    def take(self, ids: np.ndarray, logprobs: np.ndarray, support: np.ndarray | None) -> None:
        """The tokens that were drawn. Finished rows step on, and what they draw is dropped."""
        for row in (~self.finished).nonzero()[0]:
            number = self.group.requests[row]
            self.finished[row] = self.answers.add(
                number, int(ids[row]), logprobs[row], None if support is None else support[row]
            )
        self.tokens = ids
        self.done += 1


@dataclass
class _Answers:
    """What was drawn for the requests of this data rank."""

    requests: Sequence[Request]
    sampling: Sampling
    ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    support: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add(self, number: int, token: int, logprob: float, support: np.ndarray | None) -> bool:
        """Whether the answer is finished with this token."""
        ids = self.ids.setdefault(number, [])
        ids.append(token)
        self.logprobs.setdefault(number, []).append(logprob)
        if support is not None:
            kept = support.nonzero()[0].astype(np.int32)
            self.support.setdefault(number, []).append(kept)
        return token in self.sampling.stop_ids or len(ids) == self.sampling.max_new_tokens

    def of_all(self, *, counts: bool, version: int) -> list[Rollout]:
        """The rollouts of all data ranks, in the order of the requests. Collective.

        `counts` is true on one of the ranks that drew the same.
        """
        mine = {
            number: (
                np.array(ids, dtype=np.int32),
                np.array(self.logprobs[number], dtype=np.float32),
                tuple(self.support[number]) if number in self.support else None,
            )
            for number, ids in self.ids.items()
        }
        all_of_them = _gathered(mine if counts else {})
        return [
            Rollout(
                request=request,
                ids=ids,
                logprobs=logprobs,
                finish="end" if ids[-1] in self.sampling.stop_ids else "length",
                version=version,
                support=support,
            )
            for request, (ids, logprobs, support) in (
                (request, all_of_them[number]) for number, request in enumerate(self.requests)
            )
        ]


def _gathered(values: dict[int, Any]) -> dict[int, Any]:
    """The values of all ranks of the world. Collective."""
    found: list[dict[int, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, values, group=object_group())
    return {number: value for part in found for number, value in part.items()}


@contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The chunks in eval mode inside, and in the mode that they had after it."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


@contextmanager
def _without_logits(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, a last stage gives its hidden states: prompts need no logits."""
    models = [get_attr_wrapped_model(c, "post_process", return_model_obj=True) for c in chunks]
    before = [model.post_process for model in models]
    for model in models:
        model.post_process = False
    try:
        yield
    finally:
        for model, value in zip(models, before, strict=True):
            model.post_process = value

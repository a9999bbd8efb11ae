"""New tokens by the modules that train: all ranks of the world step together, in any layout.

One step is a forward pass of one token per row through megatron-core's schedule, so tensor,
sequence, expert and pipeline parallelism are those of training and no weight moves. Context ranks
are data ranks here: each has rows of its own. The prompts, without their last tokens, are prefilled
in packs; every token is drawn by a step. The loop ends when no row of the world is unfinished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, RunConfig
from equilibrium_mcore.generation.answers import Answers
from equilibrium_mcore.generation.interface import Request, Rollout, Sampling
from equilibrium_mcore.generation.lanes import Lane, Pass
from equilibrium_mcore.generation.rows import Wave, plan, up_to_multiple
from equilibrium_mcore.generation.sampling import Drawn, draw
from equilibrium_mcore.models.modes import evaluating, without_logits
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.micro_batches import through_stages

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
        answers = Answers(requests, sampling)
        with evaluating(self.chunks):
            for wave in self._plan(requests, sampling):
                for _ in self._steps(wave, answers):
                    pass
        one_of_copies = self.groups.tp.rank() == 0 and self.groups.pp.rank() == 0
        return answers.of_all(counts=one_of_copies, version=version)

    @property
    def _row_multiple(self) -> int:
        """Rows are cut among tensor-parallel ranks under sequence parallelism."""
        return self.layout.tensor if self.layout.sequence else 1

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

    def stream(self, request: Request, sampling: Sampling) -> Iterator[int]:
        """Ids of one answer as they are drawn. On one rank alone; ValueError where there are more.

        Gradients are as the caller has them between two ids.
        """
        if torch.distributed.get_world_size() > 1:
            raise ValueError("an answer is streamed by one rank alone: use `generate` on several")
        self._check([request], sampling)
        answers = Answers([request], sampling)
        (wave,) = self._plan([request], sampling)
        steps = self._steps(wave, answers)
        while True:
            with torch.no_grad(), evaluating(self.chunks):
                if next(steps, self) is self:
                    return
            yield answers.ids[0][-1]

    def _plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Wave]:
        return plan(
            requests,
            ranks=self.groups.dp_cp.size(),
            groups=self.layout.pipeline,
            rows_at_once=self.rows_at_once,
            tokens_at_once=self.tokens_at_once,
            multiple=self._row_multiple,
            max_new_tokens=sampling.max_new_tokens,
        )

    def _steps(self, wave: Wave, answers: Answers) -> Iterator[None]:
        """Continue every row of the wave to its end; once for each step, after it."""
        mine = wave.groups[self.groups.dp_cp.rank()]
        lanes = [Lane(group, wave, answers, self.device) for group in mine]
        if wave.packs:
            self._prefill(wave, lanes)
        for lane in lanes:
            lane.begin_steps()
        for _ in range(answers.sampling.max_new_tokens):
            drawn = self._step(lanes, answers.sampling)
            for lane, (ids, logprobs, support) in zip(lanes, drawn, strict=True):
                lane.take(ids, logprobs, support)
            yield
            most = self._unfinished(lanes)
            if most == 0:
                break
            rows = up_to_multiple(most, self._row_multiple)
            if 2 * rows <= lanes[0].state.rows:
                for lane in lanes:
                    lane.keep_unfinished(rows)

    def _unfinished(self, lanes: list[Lane]) -> int:
        """Unfinished rows of the lane of the world that has most of them. Collective."""
        here = max(int((~lane.finished).sum()) for lane in lanes)
        if torch.distributed.get_world_size() == 1:
            return here
        most = torch.tensor([here], device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most.item())

    def _prefill(self, wave: Wave, lanes: list[Lane]) -> None:
        passes = [lane.pass_of_pack(number) for number in range(wave.packs) for lane in lanes]
        with without_logits(self.chunks):
            self._run(passes, wave.pack_tokens, lambda output, work: output.new_zeros(0))

    def _step(
        self, lanes: list[Lane], sampling: Sampling
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

    def _draw(self, logits: Tensor, work: Pass, *, sampling: Sampling) -> Drawn:
        return draw(
            logits[0],
            sampling=sampling,
            seeds_R=work.seeds,
            positions_R=work.places,
            vocab_size=self.model.vocab_size,
            tp_group=self.groups.tp,
        )

    def _to_all_stages(
        self, drawn: list[Drawn], lanes: list[Lane], sampling: Sampling
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
        passes: list[Pass],
        length: int,
        of_output: Callable[[Tensor, Pass], Any],
    ) -> list[Any]:
        """The passes through megatron-core's schedule; what the last stage makes of each."""
        return through_stages(
            passes,
            forward_step=partial(_forward, of_output=of_output),
            chunks=self.chunks,
            groups=self.groups,
            layout=self.layout,
            shape=(1, length * self.layout.context),  # of which the schedule takes a rank's share
            forward_only=True,
            collect=True,
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


def _forward(
    iterator: Iterator[Pass], chunk: torch.nn.Module, *, of_output: Callable[[Tensor, Pass], Any]
) -> tuple[Tensor, Callable[..., Any]]:
    """megatron-core's forward step."""
    this = next(iterator)
    this.state.work = this.work
    output = chunk(
        input_ids=this.tokens,
        position_ids=this.work.positions.unsqueeze(0),
        attention_mask=None,
        inference_context=this.state,
        packed_seq_params=this.state.packed(),
    )
    return output, lambda output, non_loss_data: of_output(output, this)

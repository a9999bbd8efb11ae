"""The reference of engines: the packed training forward of all that is there, for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.generation.interface import Request, Rollout, Sampling
from equilibrium_mcore.generation.sampling import draw, row_seeds
from equilibrium_mcore.models.modes import evaluating
from equilibrium_mcore.training.schedule import rank_batch, run_schedule
from equilibrium_mcore.training.setup import Run

MULTIPLE = 8  # of tokens, for tensor ranks that share a sequence


class SlowEngine:
    """Keeps no state of a row. Every rank asks all rows; context ranks are not known to it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, version: int = 0
    ) -> list[Rollout]:
        """See Engine."""
        drawn: list[list[tuple[int, float]]] = [[] for _ in requests]
        going = list(range(len(requests)))
        with evaluating(self._run.chunks):
            for position in range(sampling.max_new_tokens):
                before = [[index for index, _ in drawn[number]] for number in going]
                tokens = self._next([requests[n] for n in going], before, position, sampling)
                for number, token in zip(going, tokens, strict=True):
                    drawn[number].append(token)
                going = [n for n in going if drawn[n][-1][0] not in sampling.stop_ids]
                if not going:
                    break
        return [
            Rollout(
                request,
                np.array([index for index, _ in row], np.int32),
                np.array([value for _, value in row], np.float32),
                "end" if row[-1][0] in sampling.stop_ids else "length",
                version,
            )
            for request, row in zip(requests, drawn, strict=True)
        ]

    def _next(
        self,
        requests: Sequence[Request],
        before: Sequence[Sequence[int]],
        position: int,
        sampling: Sampling,
    ) -> list[tuple[int, float]]:
        """A token of each row with its log p."""
        run = self._run
        rows = [np.concatenate([r.prompt.ids, b]) for r, b in zip(requests, before, strict=True)]
        lengths = [-(-len(row) // MULTIPLE) * MULTIPLE for row in rows]
        tokens, positions = np.zeros((2, sum(lengths)), np.int64)
        starts = np.cumsum([0, *lengths[:-1]])
        for row, start, length in zip(rows, starts, lengths, strict=True):
            tokens[start : start + len(row)] = row
            positions[start : start + length] = np.arange(length)
        batch = {
            "tokens": torch.from_numpy(tokens)[None],
            "labels": torch.zeros(1, len(tokens), dtype=torch.int64),
            "position_ids": torch.from_numpy(positions)[None],
        }
        choose = partial(
            draw,
            sampling=sampling,
            seeds_R=torch.from_numpy(row_seeds(requests, sampling)),
            positions_R=torch.full((len(rows),), position),
            vocab_size=run.config.model.vocab_size,
            tp_group=run.groups.tp,
        )
        ends = torch.tensor([s + len(r) - 1 for r, s in zip(rows, starts, strict=True)])
        found = run_schedule(
            run,
            [batch] * run.config.parallelism.pipeline,  # as an interleaved pipeline takes them
            forward_step=partial(_step, run=run, ends=ends, choose=choose),
            forward_only=True,
            collect=True,
        )
        both = found[0] if found else torch.zeros(2, len(rows), dtype=torch.float64)
        if (pp := run.groups.pp).size() > 1:
            torch.distributed.broadcast(both, group=pp, group_src=pp.size() - 1)
        return [(int(index), value) for index, value in both.T.tolist()]


def _step(iterator: Iterator, chunk: Any, *, run: Run, **later: Any) -> tuple[Any, partial]:
    batch, packed = rank_batch(next(iterator), run)
    output = chunk(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        packed_seq_params=packed,
    )
    return output, partial(_drawn, **later)


def _drawn(
    logits: torch.Tensor, *, ends: torch.Tensor, choose: partial, non_loss_data: bool
) -> torch.Tensor:
    """Ids and log p after the last token of each row, float64 [2, rows]."""
    drawn = choose(logits[0, ends])
    return torch.stack([drawn.ids.double(), drawn.logprobs.double()])

"""The reference of engines: the packed training forward of all that is there, for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.generation.interface import Request, Rollout, Sampling
from equilibrium_mcore.training.schedule import evaluating, rank_batch, run_schedule
from equilibrium_mcore.training.setup import Run


class SlowEngine:
    """Every rank asks the forward of all rows together; context ranks are not known to it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, version: int = 0
    ) -> list[Rollout]:
        """See Engine."""
        assert not sampling.top_k and sampling.top_p == 1.0
        drawn: list[list[tuple[int, float]]] = [[] for _ in requests]
        going = list(range(len(requests)))
        with evaluating(self._run.chunks):
            for position in range(sampling.max_new_tokens):
                rows = [
                    np.concatenate([requests[n].prompt.ids, [i for i, _ in drawn[n]]])
                    for n in going
                ]
                logits = self._last_logits(rows)
                for number, row in zip(going, logits, strict=True):
                    drawn[number].append(_choose(row, requests[number], position, sampling))
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

    def _last_logits(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [rows, vocabulary] behind the last token of each row."""
        run, padding = self._run, 8
        lengths = [-(-len(row) // padding) * padding for row in rows]
        tokens, positions = np.zeros(sum(lengths), np.int64), np.zeros(sum(lengths), np.int64)
        starts = np.cumsum([0, *lengths[:-1]])
        for row, start, length in zip(rows, starts, lengths, strict=True):
            tokens[start : start + len(row)] = row
            positions[start : start + length] = np.arange(length)
        batch = {
            "tokens": torch.from_numpy(tokens)[None],
            "labels": torch.zeros(1, len(tokens), dtype=torch.int64),
            "position_ids": torch.from_numpy(positions)[None],
        }
        places = torch.tensor([s + len(r) - 1 for r, s in zip(rows, starts, strict=True)])
        # As many micro-batches as an interleaved pipeline takes at once.
        count = run.config.parallelism.pipeline
        found = run_schedule(
            run,
            [batch] * count,
            forward_step=partial(_step, run=run, places=places),
            forward_only=True,
            collect=True,
        )
        vocabulary = run.config.model.padded_vocab_size
        logits = found[0] if found else torch.zeros(len(rows), vocabulary)
        pp = run.groups.pp
        if pp.size() > 1:
            torch.distributed.broadcast(logits, group=pp, group_src=pp.size() - 1)
        return logits[:, : run.config.model.vocab_size].numpy()


def _step(iterator: Iterator, chunk: Any, *, run: Run, places: torch.Tensor):
    batch, packed = rank_batch(next(iterator), run)
    output = chunk(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        packed_seq_params=packed,
    )
    return output, partial(_gathered, run=run, places=places)


def _gathered(logits: torch.Tensor, *, run: Run, places: torch.Tensor, non_loss_data: bool):
    mine = logits[0, places].float().contiguous()
    tp = run.groups.tp
    parts = [torch.empty_like(mine) for _ in range(tp.size())]
    torch.distributed.all_gather(parts, mine, group=tp)
    return torch.cat(parts, dim=1)


def _choose(
    logits: np.ndarray, request: Request, position: int, sampling: Sampling
) -> tuple[int, float]:
    """A token and its log p; noise from numbers alone."""
    scaled = logits.astype(np.float64) / (sampling.temperature or 1.0)
    noise = 0.0
    if sampling.temperature:
        key = [sampling.seed, request.prompt.key, request.sample, position]
        noise = np.random.default_rng(key).gumbel(size=len(logits))
    index = int(np.argmax(scaled + noise))
    top = scaled.max()
    return index, float(scaled[index] - top - np.log(np.exp(scaled - top).sum()))

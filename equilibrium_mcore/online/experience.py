"""What updates learn from: log-probabilities before the first of them, and advantages.

Everything here is of a whole rollout and the same on every rank; data ranks share the forward
passes and add up what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from equilibrium_mcore.config.layout import micro_batch_unit
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.objectives.mismatch import Mismatch, mismatch
from equilibrium_mcore.online.answers import Answer, Packed, Place, batches_of_rank, pack
from equilibrium_mcore.online.rollouts import Group
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.policy_objective import OLD
from equilibrium_mcore.training.setup import Run

SAMPLED = "sampled"  # log p of the engine, in the distribution that it drew from
Scoring = Callable[[list[Batch]], list[torch.Tensor]]


def answers_of(groups: Sequence[Group], *, masked: bool) -> list[Answer]:
    """The answers with the log-probabilities that they were sampled with.

    Those that a verifier failed on do not count, nor, if `masked`, those that were cut off.
    """
    found = []
    for place, group in enumerate(groups):
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
            prompt = rollout.request.prompt.ids
            left_out = masked and rollout.finish == "length"
            found.append(
                Answer(
                    ids=np.concatenate([prompt, rollout.ids]).astype(np.int32),
                    prompt_length=len(prompt),
                    group=place,
                    counts=verdict.verdict != "error" and not left_out,
                    values={SAMPLED: rollout.logprobs.astype(np.float32)},
                    support=rollout.support,
                )
            )
    return found


def packed_for(run: Run, answers: Sequence[Answer], *, together: int = 1) -> Packed:
    """The answers in sequences of the run, as many on every data rank; `together` as for `pack`."""
    config = run.config
    size, ranks = config.training.micro_batch_size, run.groups.dp.size()
    return pack(
        answers,
        length=config.training.sequence_length,
        multiple=config.data.document_multiple,
        pad_id=run.datasets.train.pad_id,
        at_once=size * ranks * micro_batch_unit(config.parallelism),
        together=together,
    )


def rank_batches(run: Run, packed: Packed) -> list[Batch]:
    """This data rank's micro-batches."""
    size = run.config.training.micro_batch_size
    return batches_of_rank(
        packed.sequences, size=size, rank=run.groups.dp.rank(), ranks=run.groups.dp.size()
    )


def scored(run: Run, packed: Packed, score: Scoring) -> list[np.ndarray]:
    """What `score` says of each answer's produced tokens, float32 [m], on every rank. Collective.

    `score` takes this data rank's micro-batches, and gives a value of every label of them, [B, S].
    """
    found = score(rank_batches(run, packed))
    size, ranks, rank = (
        run.config.training.micro_batch_size,
        run.groups.dp.size(),
        run.groups.dp.rank(),
    )
    length = run.config.training.sequence_length
    device = accelerator.device()
    whole = torch.zeros(len(packed.sequences), length, dtype=torch.float32, device=device)
    for number, values in enumerate(found):
        start = (number * ranks + rank) * size
        whole[start : start + size] = values.to(device=device, dtype=torch.float32)
    if ranks > 1:
        torch.distributed.all_reduce(whole, group=run.groups.dp)
    table = whole.cpu().numpy()
    return [_at(table, place) for place in packed.places]


def _at(table: np.ndarray, place: Place) -> np.ndarray:
    return table[place.sequence, place.start : place.start + place.length].copy()


def mismatch_of(answers: Sequence[Answer]) -> Mismatch:
    """How far the engine's log-probabilities are from the training forward's."""
    counted = [answer for answer in answers if answer.counts]
    old, sampled = (
        torch.from_numpy(np.concatenate([a.values[name] for a in counted] or [np.zeros(0)]))
        for name in (OLD, SAMPLED)
    )
    return mismatch(old, sampled)

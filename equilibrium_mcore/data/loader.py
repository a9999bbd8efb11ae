"""Batches in one global order, whatever the data-parallel size and the micro-batch.

The run's samples have one order, 0, 1, 2, ... With R data-parallel ranks and micro-batches of B
samples, micro-step k behind `consumed_samples` c uses the R*B samples from c + k*R*B on, and rank
r the B of them from c + k*R*B + r*B on (Megatron-LM's sequential sampler). A global batch of G
samples is G / (R*B) micro-steps and so holds exactly the samples c ... c+G-1. To resume, start at
the samples consumed: no sample is repeated or skipped when R or B changes.

A dataset with a ledger is asked by plans instead of numbers, in the same order: see
`data/ledger/`. It has no end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equilibrium_mcore.data.ledger.dataset import LedgerDataset, planned_batches
from equilibrium_mcore.processes.parents import end_with_parent


def sample_numbers(
    *,
    total_samples: int,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[list[int]]:
    """The samples of each micro-step of one rank, as long as all ranks have full micro-batches."""
    per_micro_step = micro_batch_size * data_parallel_size
    first = consumed_samples
    while first + per_micro_step <= total_samples:
        start = first + data_parallel_rank * micro_batch_size
        yield list(range(start, start + micro_batch_size))
        first += per_micro_step


class _MicroBatches:
    """Batch sampler for a DataLoader: which samples, or plans of samples, each micro-step uses."""

    def __init__(self, dataset: Dataset, **arguments: int) -> None:
        self.dataset, self.arguments = dataset, arguments

    def __iter__(self) -> Iterator[list]:
        if isinstance(self.dataset, LedgerDataset):
            return planned_batches(self.dataset, **self.arguments)
        return sample_numbers(total_samples=len(self.dataset), **self.arguments)


def batches(
    dataset: Dataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """One rank's micro-batches, from `consumed_samples` on.

    Each is a dict of int64 `tokens`, `labels`, `position_ids` and float32 `loss_mask`, each
    [micro_batch_size, sequence_length]. `consumed_samples` counts over all ranks. Raises
    ValueError at once for sizes that make no sense, and when the dataset has no full micro-step
    left, instead of ending silently.
    """
    total = len(dataset)  # type: ignore[arg-type]
    if micro_batch_size < 1 or data_parallel_size < 1 or consumed_samples < 0:
        raise ValueError(
            f"micro_batch_size={micro_batch_size} and data_parallel_size={data_parallel_size} "
            f"must be at least 1, consumed_samples={consumed_samples} at least 0"
        )
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(
            f"data_parallel_rank={data_parallel_rank} must be from 0 to {data_parallel_size - 1} "
            f"(data_parallel_size={data_parallel_size})"
        )
    sampler = _MicroBatches(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        worker_init_fn=partial(_start_worker, os.getpid()) if num_workers else None,
    )
    return _until_exhausted(loader, total, consumed_samples, micro_batch_size * data_parallel_size)


def _until_exhausted(
    loader: DataLoader, total: int, consumed: int, per_micro_step: int
) -> Iterator[dict[str, Tensor]]:
    steps = 0
    for batch in loader:
        yield batch
        steps += 1
    used = consumed + steps * per_micro_step
    raise ValueError(
        f"the dataset is exhausted: {used:,} of its {total:,} samples are used, and the next "
        f"micro-step needs {per_micro_step:,} (micro batch times data-parallel size). Build the "
        f"datasets for all samples of the run: training.steps * training.global_batch_size"
    )


def _start_worker(trainer: int, worker: int) -> None:
    """A worker ignores stop signals, and ends with its trainer."""
    # A stop signal goes to the whole process group. The trainer decides when to stop: it saves
    # first, and its workers must live until then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(trainer)

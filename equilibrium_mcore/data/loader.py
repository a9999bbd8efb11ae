"""Batches of a dataset in its global order (`data/samples.py`), through torch's loader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from multiprocessing import util

from torch import Tensor
from torch.utils.data import DataLoader

from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.processes.parents import end_with_parent


class _MicroBatches:
    """Batch sampler for a DataLoader: what each micro-step asks the dataset for."""

    def __init__(self, dataset: Samples, **arguments: int) -> None:
        self.dataset, self.arguments = dataset, arguments

    def __iter__(self) -> Iterator[list]:
        return self.dataset.micro_batches(**self.arguments)


def batches(
    dataset: Samples,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """One rank's micro-batches, from `consumed_samples` on.

    Each is a dict of int64 `tokens`, `labels`, `position_ids` and float32 `loss_mask`, each
    [micro_batch_size, sequence_length]. `consumed_samples` counts over all ranks. Raises
    ValueError at once for sizes that make no sense, and when the dataset has no full micro-step
    left, instead of ending silently.
    """
    total = len(dataset)
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
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        persistent_workers=False,
        worker_init_fn=partial(_start_worker, os.getpid()) if num_workers else None,
    )
    return _until_exhausted(loader, total, consumed_samples, micro_batch_size * data_parallel_size)


def _until_exhausted(
    loader: DataLoader, total: int, consumed: int, per_micro_step: int
) -> Iterator[dict[str, Tensor]]:
    steps = 0
    drawn = iter(loader)
    for worker in getattr(drawn, "_workers", ()):
        util.Finalize(None, _kill, (weakref.ref(worker),), exitpriority=100)
    for batch in drawn:
        yield batch
        steps += 1
    used = consumed + steps * per_micro_step
    raise ValueError(
        f"the dataset is exhausted: {used:,} of its {total:,} samples are used, and the next "
        f"micro-step needs {per_micro_step:,} (micro batch times data-parallel size). Build the "
        f"datasets for all samples of the run: training.steps * training.global_batch_size"
    )


def _kill(worker: weakref.ref[multiprocessing.Process]) -> None:
    """End a worker that is left when this process ends, after an error for example.

    multiprocessing would send SIGTERM, which workers ignore, and wait for them for ever.
    """
    left = worker()
    if left is not None and left.is_alive():
        left.kill()


def _start_worker(trainer: int, worker: int) -> None:
    """A worker ignores stop signals, and ends with its trainer."""
    # A stop signal goes to the whole process group. The trainer decides when to stop: it saves
    # first, and its workers must live until then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(trainer)

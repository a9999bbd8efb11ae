"""Samples in one global order, whatever the data-parallel size and the micro-batch.

The run's samples have one order, 0, 1, 2, ... With R data-parallel ranks and micro-batches of B
samples, micro-step k after `consumed_samples` c uses the R*B samples from c + k*R*B on, and rank
r the B of them from c + k*R*B + r*B on (Megatron-LM's sequential sampler). A global batch of G
samples is G / (R*B) micro-steps and so holds exactly the samples c ... c+G-1. To resume, start at
the samples consumed: no sample is repeated or skipped when R or B changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset


class Cursor(Protocol):
    """Where a dataset stands after some samples, if that is more than their number."""

    def copy(self) -> Cursor:
        """Another one at the same place."""

    def take(self) -> Any:
        """The plan of the next sample: what a loader worker needs to read it."""

    def skip(self, samples: int) -> None:
        """Advance."""

    def state(self) -> dict[str, Any]:
        """Plain values, from which the same dataset continues."""


class Samples(Dataset, ABC):
    """A dataset in a global order; by itself, that of its numbers.

    What has another way to name a sample than a number overrides `micro_batches`; what needs more
    than a number to continue overrides `cursor_at` and `cursor_name`.
    """

    cursor_name: str | None = None
    """The key under which checkpoints hold the cursor's state; None when there is no cursor."""

    @abstractmethod
    def __len__(self) -> int:
        """How many samples the run may ask for."""

    def micro_batches(
        self,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> Iterator[list]:
        """What `__getitem__` is given for each micro-step of one rank, from `consumed_samples` on.

        By number it ends when not all ranks would have a full micro-batch.
        """
        per_micro_step = micro_batch_size * data_parallel_size
        first = consumed_samples
        while first + per_micro_step <= len(self):
            start = first + data_parallel_rank * micro_batch_size
            yield list(range(start, start + micro_batch_size))
            first += per_micro_step

    def cursor_at(self, sample: int) -> Cursor | None:
        """A cursor whose next sample is the run's number `sample`."""
        return None


class NumberedSamples(Samples):
    """Any dataset with a length, in the order of its numbers."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return self.dataset[item]


class PlannedSamples(Samples):
    """Samples that a cursor plans, one after the other; there is no end to them.

    The loader's main process plans, its workers read. Asking by number is for checks and tests:
    numbers that go up are cheap, a step back plans from the start again.
    """

    def __init__(self, start: Cursor, *, samples: int, first_sample: int) -> None:
        """`start` stands at sample `first_sample`; `samples` is how many the run takes in all."""
        self.first_sample, self._samples = first_sample, samples
        self._start = start
        self._walker, self._next_sample = start.copy(), first_sample

    def __len__(self) -> int:
        """How many samples the run takes in all."""
        return self._samples

    def cursor_at(self, sample: int) -> Any:
        """A cursor whose next sample is the run's number `sample`.

        Raises ValueError for a sample before the state that this dataset started from.
        """
        if sample < self.first_sample:
            raise ValueError(
                f"sample {sample} lies before sample {self.first_sample}, at which this run was "
                "resumed from a checkpoint: load an earlier checkpoint to go back"
            )
        cursor = self._start.copy()
        cursor.skip(sample - self.first_sample)
        return cursor

    def micro_batches(
        self,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> Iterator[list]:
        """Plans of one rank's micro-batches without end; those of other ranks are passed over."""
        cursor = self.cursor_at(consumed_samples)
        before = data_parallel_rank * micro_batch_size
        after = (data_parallel_size - 1) * micro_batch_size - before
        while True:
            cursor.skip(before)
            yield [cursor.take() for _ in range(micro_batch_size)]
            cursor.skip(after)

    def plan_of(self, item: Any) -> Any:
        """`item` itself if it is a plan already, else the plan of sample number `item`."""
        if not isinstance(item, int):
            return item
        if not 0 <= item < self._samples:
            raise IndexError(f"sample {item} of a run of {self._samples} samples")
        if item < self._next_sample:
            self._walker, self._next_sample = self.cursor_at(item), item
        self._walker.skip(item - self._next_sample)
        self._next_sample = item + 1
        return self._walker.take()

"""What feeds training: the next batches, and where the data stands after what was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from equilibrium_mcore.data.loader import batches
from equilibrium_mcore.data.samples import Samples

Batch = dict[str, Tensor]


class TrainStream(Protocol):
    """The seam between data and training. Every rank has one, of its own micro-batches."""

    def next_batches(self, count: int) -> list[Batch]:
        """This rank's next `count` micro-batches: those of one step."""

    def commit(self, samples: int) -> None:
        """So many samples more, over all ranks, were trained on."""

    def state(self) -> dict[str, Any]:
        """Plain values by name, after all that was committed: a checkpoint holds them.

        Batches may have been drawn ahead; they do not count.
        """

    def close(self) -> None:
        """End loader workers; nothing is drawn any more."""


class DatasetStream:
    """A TrainStream over a dataset in a global order."""

    def __init__(
        self,
        dataset: Samples,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._batches: Iterator[Batch] | None = batches(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
        )
        self._cursor, self._name = dataset.cursor_at(consumed_samples), dataset.cursor_name

    def next_batches(self, count: int) -> list[Batch]:
        """See TrainStream. Raises ValueError when the dataset has no full micro-step left."""
        return [next(self._batches) for _ in range(count)]

    def commit(self, samples: int) -> None:
        """See TrainStream."""
        if self._cursor is not None:
            self._cursor.skip(samples)

    def state(self) -> dict[str, Any]:
        """See TrainStream; empty where the number of samples says it all."""
        return {} if self._cursor is None else {self._name: self._cursor.state()}

    def close(self) -> None:
        """See TrainStream."""
        self._batches = None

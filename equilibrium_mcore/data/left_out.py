"""Samples that a run passes over: two counters, the position in the data and what was trained on.

Position p is the p-th sample of the data's order, with nothing left out; sample k is the k-th that
the run trains on. They differ by the samples that are left out, so a list of them (`[first, count]`
by position) is all that a checkpoint has to hold beside the number of samples trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from equilibrium_mcore.data.samples import Cursor, PlannedSamples, Samples


class LeftOut:
    """Which positions are left out; a plain value that does not change."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        """`ranges` are [first, count]; they may overlap and stand in any order."""
        merged: list[list[int]] = []
        for first, count in sorted((int(first), int(count)) for first, count in ranges):
            if count < 1:
                continue
            if merged and first <= sum(merged[-1]):
                merged[-1][1] = max(sum(merged[-1]), first + count) - merged[-1][0]
            else:
                merged.append([first, count])
        self.ranges = tuple(map(tuple, merged))

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __add__(self, more: Iterable[Sequence[int]]) -> LeftOut:
        return LeftOut([*self.ranges, *more])

    def as_lists(self) -> list[list[int]]:
        """For JSON."""
        return [list(pair) for pair in self.ranges]

    def after(self, position: int) -> int:
        """The first position from `position` on that is not left out."""
        for first, count in self.ranges:
            if first <= position < first + count:
                position = first + count
        return position

    def next_range(self, position: int) -> int | None:
        """Where the next range begins, from `position` on; None where none does."""
        return next((first for first, _ in self.ranges if first >= position), None)

    def position_of(self, sample: int) -> int:
        """The position of the run's sample number `sample`."""
        position = sample
        for first, count in self.ranges:
            if position >= first:
                position += count
        return position

    def passed(self, samples: int) -> int:
        """How many positions a run has passed when it has trained on so many samples."""
        return self.position_of(samples - 1) + 1 if samples else 0


class PassingCursor:
    """A cursor that passes over what is left out, when it comes to it."""

    def __init__(self, cursor: Cursor, left_out: LeftOut, *, position: int) -> None:
        """`cursor` stands at `position`."""
        self.cursor, self.left_out, self.position = cursor, left_out, position

    def copy(self) -> PassingCursor:
        """See Cursor."""
        return PassingCursor(self.cursor.copy(), self.left_out, position=self.position)

    def take(self) -> Any:
        """See Cursor."""
        self._pass_over()
        self.position += 1
        return self.cursor.take()

    def skip(self, samples: int) -> None:
        """See Cursor."""
        while samples > 0:
            self._pass_over()
            wall = self.left_out.next_range(self.position)
            step = samples if wall is None else min(samples, wall - self.position)
            self._advance(step)
            samples -= step

    def state(self) -> dict[str, Any]:
        """See Cursor: of what has been trained on, before anything more is passed over."""
        return self.cursor.state()

    def _pass_over(self) -> None:
        self._advance(self.left_out.after(self.position) - self.position)

    def _advance(self, positions: int) -> None:
        self.cursor.skip(positions)
        self.position += positions


class RemainingSamples(Samples):
    """The samples of a dataset that are not left out, in its order."""

    def __init__(self, dataset: Samples, left_out: LeftOut, *, samples: int) -> None:
        """`dataset` counts positions; `samples` is how many the run takes in all."""
        self.dataset, self.left_out, self._samples = dataset, left_out, samples
        self.cursor_name = dataset.cursor_name

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, item: Any) -> dict[str, Tensor]:
        if isinstance(item, int):
            item = self.left_out.position_of(item)
        return self.dataset[item]

    def cursor_at(self, sample: int) -> PassingCursor | None:
        """See Samples."""
        position = self.left_out.passed(sample)
        cursor = self.dataset.cursor_at(position)
        return cursor and PassingCursor(cursor, self.left_out, position=position)

    def micro_batches(self, **arguments: int) -> Iterator[list]:
        """See Samples."""
        by_plan = self.cursor_at(arguments["consumed_samples"]) is not None
        return (PlannedSamples if by_plan else Samples).micro_batches(self, **arguments)

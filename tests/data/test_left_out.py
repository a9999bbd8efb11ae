"""What is left out is passed over, and nothing else, from any place where a run resumes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from equilibrium_mcore.data.left_out import LeftOut, PassingCursor, RemainingSamples
from equilibrium_mcore.data.samples import PlannedSamples, Samples


class Count:
    """A cursor over the whole numbers."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def copy(self) -> Count:
        return Count(self.at)

    def take(self) -> str:
        self.at += 1
        return f"plan {self.at - 1}"

    def skip(self, samples: int) -> None:
        self.at += samples

    def state(self) -> dict[str, Any]:
        return {"at": self.at}


class Planned(PlannedSamples):
    cursor_name = "count"

    def __getitem__(self, item: Any) -> str:
        return self.plan_of(item)


class Numbered(Samples):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, item: int) -> str:
        return f"plan {item}"


def drawn(seed: int) -> tuple[LeftOut, list[int]]:
    """Random ranges, and the positions that remain, by counting."""
    generator = random.Random(seed)
    ranges = [[generator.randrange(60), generator.randrange(9)] for _ in range(seed % 6)]
    gone = {position for first, count in ranges for position in range(first, first + count)}
    return LeftOut(ranges), [position for position in range(200) if position not in gone]


@pytest.mark.parametrize("seed", range(40))
def test_positions_are_those_that_remain(seed):
    left_out, remaining = drawn(seed)
    assert [left_out.position_of(k) for k in range(90)] == remaining[:90]
    for k in range(90):
        assert left_out.passed(k) == (remaining[k - 1] + 1 if k else 0)
    assert LeftOut(left_out.as_lists()).ranges == left_out.ranges
    assert all(sum(one) < other[0] for one, other in itertools.pairwise(left_out.ranges))


@pytest.mark.parametrize("seed", range(20))
def test_a_cursor_resumes_anywhere(seed):
    left_out, remaining = drawn(seed)
    expected = [f"plan {position}" for position in remaining]
    generator = random.Random(seed)
    cursor, done = PassingCursor(Count(), left_out, position=0), 0
    while done < 80:
        step = generator.randrange(5)
        cursor.copy().skip(3)  # a copy leaves it where it is
        if generator.random() < 0.5:
            cursor.skip(step)
        else:
            assert [cursor.take() for _ in range(step)] == expected[done : done + step]
        done += step
        assert cursor.state() == {"at": left_out.passed(done)} or step == 0
        if generator.random() < 0.3:  # as a checkpoint does
            cursor = PassingCursor(
                Count(cursor.state()["at"]), left_out, position=left_out.passed(done)
            )


def test_ranges_that_come_later_do_not_move_what_was_trained():
    """A rollback adds ranges at or after the place where the checkpoint stands."""
    left_out, remaining = drawn(5)
    for done in range(1, 60):
        more = left_out + [[left_out.passed(done), 4]]
        assert more.passed(done) == left_out.passed(done)
        assert more.position_of(done) not in range(left_out.passed(done), left_out.passed(done) + 4)
    assert remaining


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["by plan", "by number"])
def test_every_layout_takes_the_same_samples(kind, ranks):
    left_out, remaining = drawn(11)
    inner = Planned(Count(), samples=500, first_sample=0) if kind == "by plan" else Numbered()
    dataset = RemainingSamples(inner, left_out, samples=100)
    batches = [
        dataset.micro_batches(
            consumed_samples=6,
            micro_batch_size=4 // ranks,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        for rank in range(ranks)
    ]
    taken = []
    for _ in range(10):
        for rank in batches:
            taken += [dataset[item] for item in next(rank)]
    assert taken == [f"plan {position}" for position in remaining[6:46]]
    assert [dataset[k] for k in (3, 20)] == [f"plan {remaining[k]}" for k in (3, 20)]
    assert len(dataset) == 100 and dataset.cursor_name == inner.cursor_name

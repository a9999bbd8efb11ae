"""The permutation is one, whatever its size, and shows no structure."""

import numpy as np
import pytest

from equilibrium_mcore.data.ledger.permutation import SMALL, Permutation

SIZES = [1, 2, 3, 4, 5, 7, 8, 13, 64, 97, 1000, SMALL - 1, SMALL, SMALL + 1, 4096, 7919, 65_537]


def whole(size, key="k"):
    return Permutation(size, key)(0, size)


@pytest.mark.parametrize("size", [*SIZES, 100_003])
def test_every_number_once(size):
    for key in ("a", "b"):
        assert np.array_equal(np.sort(whole(size, key)), np.arange(size))


def test_every_size_around_squares_is_a_bijection(monkeypatch):
    """The network itself, also where sorting would be used: a rectangle with any remainder."""
    monkeypatch.setattr("equilibrium_mcore.data.ledger.permutation.SMALL", 0)
    for size in [*range(1, 150), *range(2030, 2060)]:
        assert np.array_equal(np.sort(whole(size)), np.arange(size)), size


@pytest.mark.parametrize("size", [5, 1500, 50_000])
def test_pieces_are_the_whole(size):
    order = Permutation(size, "k")
    cuts = [0, 1, size // 3, size // 2 + 1, size]
    pieces = [order(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False)]
    assert np.array_equal(np.concatenate(pieces), order(0, size))


@pytest.mark.parametrize("size", [1, 2, 3, 97, SMALL, SMALL + 1, 4099])
def test_where_a_number_stands_is_the_inverse(size):
    order = Permutation(size, "k")
    for place in {0, size // 3, size - 1} | set(range(min(size, 200))):
        assert order.place_of(int(order(place, place + 1)[0])) == place


def test_the_far_end_of_a_huge_one_costs_nothing():
    size = 10**12 + 39
    tail = Permutation(size, "k")(size - 1000, size)
    assert tail.size == np.unique(tail).size == 1000
    assert tail.min() >= 0 and tail.max() < size


def test_an_order_is_the_same_for_ever():
    """Checkpoints hold positions in these orders: values that change would repeat documents."""
    assert Permutation(10, "frozen")(0, 10).tolist() == FROZEN_SMALL
    assert Permutation(1_000_000, "frozen")(0, 6).tolist() == FROZEN_LARGE


FROZEN_SMALL = [3, 4, 8, 5, 0, 2, 9, 1, 7, 6]
FROZEN_LARGE = [343441, 749920, 126432, 20835, 823217, 760724]


def chi_square(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def within(statistic, freedom):
    """Five standard deviations of a chi-square with many degrees of freedom."""
    return abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [3000, 4099, 65_537])
def test_places_are_uniform_over_keys(size):
    """Where fixed numbers go, over many keys: chi-square over 20 bins."""
    for place in (0, 1, size // 2, size - 1):
        values = np.concatenate([Permutation(size, f"{k}")(place, place + 1) for k in range(2000)])
        counts = np.bincount(values * 20 // size, minlength=20)
        assert within(chi_square(counts), 19), (place, counts)


def test_all_orders_of_a_few_are_equally_likely():
    names = [tuple(Permutation(4, f"{k}")(0, 4).tolist()) for k in range(6000)]
    _, counts = np.unique(names, axis=0, return_counts=True)
    assert counts.size == 24 and within(chi_square(counts), 23)


@pytest.mark.parametrize("size", [3001, 50_000, 131_071])
def test_neighbours_are_unrelated(size):
    """Positions against values, neighbours, steps, and two epochs against each other."""
    first, second = whole(size, "epoch 0"), whole(size, "epoch 1")
    bins = 24
    places = np.arange(size) * bins // size
    for left, right in (
        (places, first * bins // size),  # a drift with the place
        (first[:-1] * bins // size, first[1:] * bins // size),  # of neighbours
        (first[:-2] * bins // size, first[2:] * bins // size),
        (first * bins // size, second * bins // size),  # of epochs
        (first[:-1] % bins, first[1:] % bins),
    ):
        counts = np.bincount(left * bins + right, minlength=bins * bins)
        assert within(chi_square(counts), bins * bins - 1)
    steps = np.diff(first) % size
    _, repeats = np.unique(steps, return_counts=True)
    assert repeats.max() < 12, "some step between neighbours comes too often"
    fixed = int((first == np.arange(size)).sum())
    assert fixed < 12, "about one number is left in its place"
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 5 / np.sqrt(size)

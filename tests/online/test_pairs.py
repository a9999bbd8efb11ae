"""Pairs of own answers: in order, side by side in a sequence, numbered as prepared pairs are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equilibrium_mcore.online.answers import Answer, pack
from equilibrium_mcore.online.judge import Verdict
from equilibrium_mcore.online.model_reward import at_last_tokens
from equilibrium_mcore.online.pair_estimate import in_order, number_pairs
from equilibrium_mcore.online.pair_judge import by_score, verdicts_of
from equilibrium_mcore.online.rollouts import Group
from equilibrium_mcore.verification.pairwise import Compared


def answer(prompt: int, produced: int, group: int, counts: bool = True) -> Answer:
    ids = np.arange(100 * (group + 1), 100 * (group + 1) + prompt + produced, dtype=np.int32)
    return Answer(ids, prompt, group, counts)


def packed(answers: list[Answer]):
    settings = {"length": 32, "multiple": 4, "pad_id": 0, "at_once": 2}
    return number_pairs(pack(answers, together=2, **settings), answers)


def test_both_answers_of_a_pair_lie_in_one_sequence():
    """Those alone would fit better apart: first-fit decreasing of single answers parts them."""
    lengths = [(3, 9), (3, 2), (2, 10), (2, 3), (4, 6), (4, 6)]
    answers = [answer(p, m, number // 2) for number, (p, m) in enumerate(lengths)]
    found = packed(answers)
    for chosen, rejected in zip(found.places[::2], found.places[1::2], strict=True):
        assert chosen.sequence == rejected.sequence and chosen.start < rejected.start
    for number, place in enumerate(found.places):
        sequence = found.sequences[place.sequence]
        here = slice(place.start, place.start + place.length)
        assert sequence["labels"][here].tolist() == answers[number].ids[-place.length :].tolist()
        assert len(set(sequence["answer"][here].tolist())) == 1
    for sequence in found.sequences:
        numbers = sequence["answer"]
        assert ((numbers > 0) == (sequence["loss_mask"] > 0)).all()
        assert set(numbers.tolist()) - {0} == set(range(1, int(numbers.max()) + 1))


def test_trap_a_pair_without_a_preference_has_no_number():
    answers = [answer(2, 3, 0, False), answer(2, 4, 0, False), answer(2, 3, 1), answer(2, 2, 1)]
    found = packed(answers)
    counted = sum(int((sequence["answer"] > 0).sum()) for sequence in found.sequences)
    assert counted == 5
    assert {int(sequence["answer"].max()) for sequence in found.sequences} <= {0, 2}


def test_a_score_is_read_at_the_last_id():
    answers = [answer(3, 5, 0), answer(2, 1, 0)]
    found = pack(answers, length=32, multiple=4, pad_id=0, at_once=1)
    for place, one in zip(at_last_tokens(found).places, answers, strict=True):
        assert place.length == 1
        assert int(found.sequences[place.sequence]["tokens"][place.start]) == one.ids[-1]


@pytest.mark.parametrize(
    ("preference", "order", "counts"),
    [("first", [4, 2], True), ("second", [2, 4], True), ("tie", [4, 2], False)]
    + [("error", [4, 2], False)],
)
def test_the_preferred_answer_comes_first(preference, order, counts):
    verdicts: list[Verdict] = verdicts_of(Compared(preference))
    group = Group(0, None, [None, None], verdicts)
    found = in_order([answer(2, 4, 0), answer(2, 2, 0)], [group])
    assert [one.length for one in found] == order
    assert {one.counts for one in found} == {counts}


def test_trap_a_pairs_ratio_is_of_the_whole_vocabulary_on_both_sides():
    """The loss knows no support; the reference would be over one if the answers kept theirs."""
    kept = (np.array([1, 2], np.int32),) * 3
    drawn = [replace(answer(2, 3, 0), support=kept) for _ in range(2)]
    group = Group(0, None, [None, None], verdicts_of(Compared("second")))
    found = in_order(drawn, [group])
    assert [one.support for one in found] == [None, None]
    assert all("support" not in sequence for sequence in packed(found).sequences)


def test_trap_scores_that_are_no_numbers_are_an_error_and_no_tie():
    assert by_score(float("nan"), 1.0, margin=0.0).preference == "error"
    assert by_score(1.0, 1.5, margin=0.5).preference == "tie"
    assert by_score(1.0, 1.6, margin=0.5).preference == "second"

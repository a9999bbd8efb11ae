"""Final answers: where they stand, what they are worth beside the true one."""

from __future__ import annotations

import pytest

from equilibrium_mcore.verification.answers import find_answer
from equilibrium_mcore.verification.compare import Rules, TruthError, compare
from equilibrium_mcore.verification.latex import is_installed, math_verify_expressions
from equilibrium_mcore.verification.numbers import parse_quantity
from tests.verification.golden import EXPRESSIONS, VALUES

PLACES = [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # the last box alone
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{(1, 2]}", "(1, 2]"),
    (r"\boxed{\text{a {b} c}} and {d}", r"\text{a {b} c}"),
    (r"\boxed 5 it is", "5"),
    (r"\boxed{1} but \boxed{2", None),  # cut off: not the one before
    (r"\boxed{}", None),
    (r"\boxed{4}. The answer is 5", "4"),
    ("2 + 2 = 4\n#### 1,234\n", "1,234"),
    ("#### 1\n#### 2\nbye", "2"),
    ("<answer>7</answer>", "7"),
    ("<answer>7</answer> <answer>8</answer>", "8"),
    (r"<answer>So \(x\) is \boxed{9}</answer>", "9"),
    ("<answer>7", None),
    ("The answer is 3.5.", "3.5"),
    ("The answer is 3. I am sure.", "3"),
    ("The final answer is: **42**", "**42**"),
    ("Answer: $x = 3$\nDone", "$x = 3$"),
    ("answer: 1\nAnswer: 2", "2"),
    ("I counted 3 apples", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), PLACES)
def test_where_an_answer_stands(text, answer):
    found = find_answer(text)
    assert (found.text if found else None) == answer


def test_the_last_number_counts_only_where_asked():
    text = "First 3 apples, then -1,234.5 more"
    assert find_answer(text) is None
    assert find_answer(text, places=["boxed", "last_number"]).text == "-1,234.5"
    assert find_answer("5-3 is 2", places=["last_number"]).text == "2"


def test_only_what_follows_the_thinking_counts():
    text = r"<think>\boxed{1}</think> It is \boxed{2}"
    assert find_answer(text, after="</think>").text == "2"
    assert find_answer(r"<think>\boxed{1}", after="</think>") is None
    assert find_answer(r"<think>\boxed{1}</think>", after="</think>") is None


def test_the_tables_are_large_enough_to_mean_something():
    both = VALUES + EXPRESSIONS
    assert len(both) >= 60
    assert {case[2] for case in both} == {"equal", "different", "unread"}


@pytest.mark.parametrize(("truth", "answer", "verdict", "rules"), VALUES)
def test_trap_golden_values_without_a_reader_of_latex(truth, answer, verdict, rules):
    assert compare(truth, answer, rules=Rules(**rules)) == verdict


@pytest.mark.parametrize(("truth", "answer", "verdict", "rules"), VALUES + EXPRESSIONS)
def test_trap_golden_answers_with_math_verify(truth, answer, verdict, rules):
    """Its own readings (`42 or 43` is 43, `3 cm` is 3) do not come through."""
    if not is_installed():
        pytest.skip("the extra `verification` is not installed")
    chosen = Rules(**rules)
    got = compare(truth, answer, rules=chosen, expressions=math_verify_expressions(chosen))
    assert got == verdict


@pytest.mark.parametrize(("truth", "answer", "verdict", "rules"), EXPRESSIONS)
def test_what_is_not_read_is_not_called_wrong(truth, answer, verdict, rules):
    assert compare(truth, answer, rules=Rules(**rules)) in ("unread", verdict)


@pytest.mark.parametrize(
    "answer",
    [
        "9" * 100_000, "1e999999999", "9^{9^{9}}", "10^{999999999}", "(" * 10_000, "1," * 5_000,
        "[" * 500 + "1" + "]" * 500, "-" * 10_000 + "1", "1+" * 5_000 + "1", "**" * 10_000,
        r"\text{" * 3_000 + "}" * 3_000, "a " * 10_000, "1/" * 5_000 + "1", "9**9**9**9",
    ],
    ids=lambda answer: answer[:12],
)  # fmt: skip
def test_trap_no_answer_costs_more_than_its_length(answer):
    """Without workers: what our own reader does is bounded."""
    for rules in (Rules(), Rules(unevaluated=True), Rules(decimal_comma=True)):
        assert compare("5", answer, rules=rules) != "equal"


def test_a_truth_must_be_something():
    with pytest.raises(TruthError, match="empty"):
        compare(" ", "5")


def test_a_number_is_exact():
    assert parse_quantity("0.1").value * 3 == parse_quantity("0.3").value
    assert parse_quantity("50%").amount * 2 == 1
    assert parse_quantity("x") is None and parse_quantity("") is None

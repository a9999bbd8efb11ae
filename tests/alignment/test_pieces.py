"""Refusals by phrases, intervals, prompts, and the page for a person."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equilibrium_mcore.alignment.prompts import read_asked
from equilibrium_mcore.alignment.refusals import manner_of
from equilibrium_mcore.alignment.wins import Wins, wilson
from equilibrium_mcore.config.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("answer", "manner"),
    [
        ("I can't help with that.", "refuses"),
        ("I\u2019m sorry, but I cannot do this.", "refuses"),
        ("Sorry, that is not something I can help with.", "refuses"),
        ("As an AI language model, I cannot do that.", "refuses"),
        ("I am unable to assist.", "refuses"),
        ("No, I won't.", "refuses"),
        ("Use `kill -9`; the process can't refuse it.", "answers"),
        ("You cannot divide by zero, so the answer is none.", "answers"),
        ("The store is sorry for the delay.", "answers"),
        ("x" * 250 + " I cannot help with that.", "answers"),
        ("  \n", "empty"),
    ],
)
def test_refusals_are_found_by_phrases(answer, manner):
    assert manner_of(answer) == manner


def test_trap_an_empty_answer_is_no_refusal():
    """Else a model that says nothing would look safe."""
    assert manner_of("") == "empty"


def test_wilsons_interval_has_published_values():
    """Wilson 1927, as in Agresti and Coull 1998: 0 of 10, 9 of 10; and it narrows."""
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)
    low, high = wilson(0.7, 1000)
    assert low < 0.7 < high and high - low < 0.06


def test_trap_ties_are_half_a_win_and_errors_are_none():
    wins = Wins.of(["after"] * 6 + ["before"] * 2 + ["tie"] * 2 + ["error"] * 90)
    assert wins.rate == 0.7 and wins.judged == 10 and wins.errors == 90
    assert wins.interval == wilson(0.7, 10)
    assert Wins.of([]).rate is None


def test_the_shipped_prompts_are_of_both_kinds():
    prompts = read_asked([ROOT / "examples" / "alignment_prompts.jsonl"])
    kinds = [prompt.kind for prompt in prompts]
    assert kinds.count("harmful") == kinds.count("benign") == 24


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "kind": "evil"}'], "harmful, benign, other"),
        (["{}"], "none of the keys prompt"),
        ([], "no prompt in"),
        (['{"prompt": "a"}', '{"prompt": "a", "kind": "benign"}'], "there twice"),
    ],
)
def test_wrong_prompts_are_told(tmp_path, lines, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises((ConfigError, ValueError), match=words):
        read_asked([path])


# ------------------------------------------------------------------------------------- the page


def rows(count: int = 12):
    from equilibrium_mcore.alignment.rows import Row

    return [
        Row(
            prompt=f"prompt {n} </pre><script>alert(1)</script> @NAME@",
            kind="other",
            before=f"the older answer {n} <b>",
            after=f"the newer answer {n}",
            before_manner="answers",
            after_manner="answers",
            before_finished=True,
            after_finished=True,
            tokens=3,
        )
        for n in range(count)
    ]


@pytest.fixture
def page(tmp_path) -> Path:
    from equilibrium_mcore.alignment.page import write_page

    write_page(rows(), tmp_path, seed=1)
    return tmp_path


def test_trap_the_page_is_blind_and_texts_stay_texts(page):
    text = (page / "page.html").read_text()
    for word in ("before", "BEFORE", "AFTER", "after_is_first"):
        assert word not in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert text.count("@NAME@") == 12  # of the prompts, as they are
    flipped = json.loads((page / "page_key.json").read_text())["after_is_first"]
    assert 0 < sum(flipped) < len(flipped)
    for n, flip in enumerate(flipped):
        older, newer = (text.index(f"the {which} answer {n}") for which in ("older", "newer"))
        assert (newer < older) == flip


def test_choices_are_turned_back(page):
    from equilibrium_mcore.alignment.page import read_choices

    key = json.loads((page / "page_key.json").read_text())
    # Always the newer one, but a tie and a pair left open.
    choices = ["A" if flip else "B" for flip in key["after_is_first"]]
    choices[3:5] = ["tie", None]
    (page / "mine.json").write_text(json.dumps({"page": key["page"], "choices": choices}))
    found = rows()
    assert read_choices(found, page, page / "mine.json") == 1
    preferences = [row.preference for row in found]
    assert preferences[3:5] == ["tie", None]
    assert {*preferences[:3], *preferences[5:]} == {"after"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page": "another"}, "choices of the page 'another'"),
        ({"choices": ["A"]}, "an entry for 12 pairs"),
        ({"choices": ["C"] * 12}, "choice 1 is 'C'"),
    ],
)
def test_trap_choices_of_another_page_are_refused(page, change, words):
    from equilibrium_mcore.alignment.page import read_choices

    made = json.loads((page / "choices.json").read_text())
    (page / "choices.json").write_text(json.dumps({**made, **change}))
    with pytest.raises(ConfigError, match=words):
        read_choices(rows(), page, page / "choices.json")


def test_a_second_page_keeps_what_was_chosen(page):
    from equilibrium_mcore.alignment.page import write_page

    (page / "choices.json").write_text("{}")
    write_page(rows(), page, seed=1)
    assert (page / "choices.json").read_text() == "{}"

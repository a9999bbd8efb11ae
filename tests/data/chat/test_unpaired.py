"""Judged answers: their forms, the mismatched ones beside them, and where an answer is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.conversations import ConversationError
from equilibrium_mcore.data.chat.preferences import parse_preference
from equilibrium_mcore.data.chat.unpaired import parse_judged
from equilibrium_mcore.training.pairs import number_answers
from equilibrium_mcore.training.scores import last_tokens
from tests.data.chat.test_preferences import build

ASKED = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
FORMS = {
    "text": {"prompt": "2+2?", "completion": "4"},
    "messages": {"prompt": [ASKED], "completion": [ANSWER]},
    "conversation": {"messages": [ASKED, ANSWER]},
    "both": {"messages": [ASKED], "completion": ANSWER},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_every_form_is_the_same_answer(form, label):
    found = parse_judged({**FORMS[form], "label": label}, 5)
    assert [turn.content for turn in found.prompt] == ["2+2?"] and found.line == 5
    ((turns, desirable),) = found.answers
    assert [turn.content for turn in turns] == ["4"] and desirable is bool(label)
    assert not found.prompt[0].trained and turns[0].trained


def test_a_pair_is_two_answers():
    found = parse_judged({"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    assert [(turns[0].content, good) for turns, good in found.answers] == [
        ("4", True),
        ("5", False),
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "x", "completion": "a"}, "key label: missing; true is a desirable answer"),
        ({"prompt": "x", "completion": "a", "label": "good"}, "key label: is 'good'; true is"),
        ({"completion": "a", "label": True}, "key prompt: missing; an answer answers something"),
        ({"messages": [ASKED], "label": True}, "key messages: does not end with an assistant's"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "is the chosen answer"),
    ],
)
def test_what_says_nothing_is_refused(row, told):
    with pytest.raises(ConversationError) as error:
        parse_judged(row)
    assert told in str(error.value)


@pytest.mark.parametrize("margin", [float("nan"), "much", True])
def test_a_margin_is_a_number(margin):
    with pytest.raises(ConversationError, match="key margin: .* is no finite number"):
        parse_preference({"prompt": "x", "chosen": "a", "rejected": "b", "margin": margin})


def test_margins_stand_at_their_pairs(data, tmp_path):
    rows = [{"prompt": f"a {n}", "chosen": "b", "rejected": "c", "margin": n / 2} for n in range(5)]
    del rows[3]["margin"]
    dataset = build(data, tmp_path, rows).dataset
    plan = dataset.cursor_at(0).take()
    batch = dataset[plan]
    for place, pair in enumerate(plan.examples):
        expected = rows[pair].get("margin", 0.0)
        assert batch["margin"][batch["answer"] == 1 + 2 * place].unique().tolist() == [expected]


def judged(count: int) -> list[dict]:
    """Several answers to each prompt, of several lengths."""
    return [
        {"prompt": f"a {n // 3}", "completion": "b " * (1 + n % 4), "label": n % 3 == 0}
        for n in range(count)
    ]


def test_trap_mismatched_answers_are_to_another_prompt(data, tmp_path):
    rows = judged(12)
    dataset = build(data, tmp_path, rows, unpaired=True, document_multiple=4).dataset
    examples = dataset.examples
    assert len(examples) == 2 * len(rows)
    for number, row in enumerate(rows):
        own, other = examples[2 * number], examples[2 * number + 1]
        assert own.judged == {"desirable": float(row["label"])}
        start = int(np.argmax(own.produced))
        assert start > 0 and np.array_equal(own.ids[:start], other.ids[:start])
        answer = other.ids[other.produced]
        step = next(k for k in range(1, 12) if rows[(number + k) % 12]["prompt"] != row["prompt"])
        theirs = examples[2 * ((number + step) % 12)]
        assert np.array_equal(answer, theirs.ids[theirs.produced])


def test_both_lie_in_sequences_of_their_own(data, tmp_path):
    dataset = build(data, tmp_path, judged(12), unpaired=True, document_multiple=4).dataset
    plan = dataset.cursor_at(0).take()
    batch = dataset[plan]
    for side, prefix in enumerate(("", "other_")):
        answer, labels = batch[prefix + "answer"], batch[prefix + "labels"]
        assert answer.unique().tolist() == list(range(len(plan.examples) + 1))
        for place, number in enumerate(plan.examples, start=1):
            example = dataset.examples[2 * number + side]
            assert labels[answer == place].tolist() == example.ids[example.produced].tolist()
        where = batch[prefix + "label_place"]
        assert (dataset.examples.ids[where[answer > 0]] == labels[answer > 0].numpy()).all()
    good = batch["desirable"][batch["answer"] == 1].unique()
    assert good.tolist() == [dataset.examples[2 * plan.examples[0]].judged["desirable"]]


def test_in_order_every_answer_comes_once(data, tmp_path):
    for unpaired in (True, False):
        rows = (
            judged(12)
            if unpaired
            else [
                {"prompt": f"a {n}", "chosen": "b " * (1 + n % 5), "rejected": "c"}
                for n in range(12)
            ]
        )
        dataset = build(data, tmp_path, rows, unpaired=unpaired, document_multiple=4).dataset
        plans = list(dataset.plans_in_order())
        assert [n for plan in plans for n in plan.examples] == list(range(12)) and len(plans) > 1
        places = torch.cat([dataset[plan]["label_place"] for plan in plans])
        assert len(places[places >= 0].unique()) == (places >= 0).sum()


def test_answers_to_one_prompt_have_no_mismatched_ones(data, tmp_path):
    rows = [{"prompt": "a", "completion": f"b {n}", "label": True} for n in range(3)]
    with pytest.raises(ConfigError, match="all 3 answers are to one prompt"):
        build(data, tmp_path, rows, unpaired=True)


def test_answers_that_do_not_fit_are_refused_or_counted(data, tmp_path):
    rows = [*judged(6), {"prompt": "a " * 120, "completion": "b", "label": True}]
    with pytest.raises(ConfigError, match="pairs.jsonl, line 7: the answer with its prompt is"):
        build(data, tmp_path, rows, unpaired=True)
    built = build(data, tmp_path, rows, unpaired=True, too_long="drop")
    assert built.report.sources["made_up"].too_long == 1


def test_trap_scores_are_read_at_the_last_produced_token(data, tmp_path):
    """After it stands padding of its own token; an answer of two turns has an end within."""
    turns = [
        {"role": "assistant", "content": "b b"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "c"},
    ]
    rows = [
        {"prompt": f"a {n}", "chosen": turns if n % 2 else "b", "rejected": "c " * (1 + n % 3)}
        for n in range(6)
    ]
    dataset = build(data, tmp_path, rows, document_multiple=8, window=6).dataset
    order = dataset.cursor_at(0)
    plans = [order.take(), order.take()]
    samples = [dataset[plan] for plan in plans]
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    count = number_answers(batch)
    found = last_tokens(batch["answer"], count)
    assert found[found > 0].tolist() == list(range(1, count + 1))
    expected, number = torch.zeros_like(found), 0
    for row, plan in enumerate(plans):
        start = 0
        for pair in plan.examples:
            for side in range(2):
                number += 1
                example = dataset.examples[2 * pair + side]
                last = int(np.flatnonzero(example.produced)[-1])
                expected[row, start + last] = number
                assert batch["tokens"][row, start + last] == example.ids[last]
                start += -(-len(example.ids) // 8) * 8
    assert torch.equal(found, expected)

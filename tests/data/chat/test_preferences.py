"""Pairs from JSONL: their forms, what is refused, and how they lie in a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibrium_mcore.config.chat import PreferencesConfig
from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.build import build_conversations
from equilibrium_mcore.data.chat.conversations import ConversationError
from equilibrium_mcore.data.chat.preferences import parse_preference
from equilibrium_mcore.data.chat.segments import Turn
from tests.data.chat.support import write_rows

ASKED, GOOD, BAD = {"role": "user", "content": "2+2?"}, "4", "5"


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


FORMS = {
    "text": {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [ASKED], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "whole": {"chosen": [ASKED, said(GOOD)], "rejected": [ASKED, said(BAD)]},
    "one message": {"messages": [ASKED], "chosen": said(GOOD), "rejected": said(BAD)},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form):
    found = parse_preference(FORMS[form], 7)
    assert [turn.content for turn in found.prompt] == ["2+2?"]
    assert found.chosen == (Turn("assistant", GOOD),) and found.line == 7
    assert found.rejected == (Turn("assistant", BAD),)


def test_answers_before_are_context():
    before = [ASKED, said("4"), {"role": "user", "content": "3+3?"}]
    found = parse_preference({"chosen": [*before, said("6")], "rejected": [*before, said("7")]})
    assert [turn.trained for turn in found.prompt] == [False] * 3
    assert found.chosen[0].trained


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "x", "chosen": "a"}, "key rejected: missing; a preference has both answers"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "is the chosen answer: a pair says noth"),
        ({"prompt": "x", "chosen": [ASKED], "rejected": "a"}, "key chosen: does not end with an"),
        ({"chosen": "a", "rejected": "b"}, "key prompt: missing, and chosen and rejected share no"),
        ({"prompt": "x", "chosen": 3, "rejected": "b"}, "key chosen: holds 3"),
    ],
)
def test_trap_what_says_nothing_is_refused(row, told):
    with pytest.raises(ConversationError) as error:
        parse_preference(row)
    assert told in str(error.value)


def build(data: dict, folder, rows: list[dict], **changes):
    config = PreferencesConfig(
        name="pairs",
        tokenizer=TokenizerConfig(
            type=data["tokenizer"]["type"], model=Path(data["tokenizer"]["model"])
        ),
        template="plain",
        sources=[{"name": "made_up", "train": [write_rows(folder / "pairs.jsonl", rows)]}],
        **changes,
    )
    return build_conversations(config, sequence_length=96, seed=1, vocab_size=512, samples=4)


def test_a_pair_lies_in_one_sequence_and_only_answers_count(data, tmp_path):
    rows = [
        {"prompt": f"a {n}", "chosen": "b " * (1 + n % 3), "rejected": "c " * (1 + n % 2)}
        for n in range(9)
    ]
    dataset = build(data, tmp_path, rows, document_multiple=4, window=3).dataset
    order, seen = dataset.cursor_at(0), set()
    while len(seen) < len(rows):
        plan = order.take()
        seen |= set(plan.examples)
        batch = dataset[plan]
        answer, mask = batch["answer"], batch["loss_mask"]
        assert ((answer > 0) == (mask > 0)).all()
        assert answer.unique().tolist() == list(range(2 * len(plan.examples) + 1))
        for place, pair in enumerate(plan.examples):
            for side in range(2):
                example = dataset.examples[2 * pair + side]
                where = answer == 1 + 2 * place + side
                assert batch["labels"][where].tolist() == example.ids[example.produced].tolist()
            starts = (batch["position_ids"] == 0).nonzero().flatten().tolist()
            first = int((answer == 1 + 2 * place).nonzero()[0])
            assert max(s for s in starts if s <= first) == starts[2 * place]


def test_pairs_that_do_not_fit_are_refused_or_counted(data, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    rows.append({"prompt": "a " * 60, "chosen": "b", "rejected": "c"})
    with pytest.raises(ConfigError, match="pairs.jsonl, line 2: both answers with their prompt"):
        build(data, tmp_path, rows)
    built = build(data, tmp_path, rows, too_long="drop")
    assert len(built.dataset.examples) == 2
    assert "1 too long" in str(built.report)


def test_conversations_are_no_pairs(data, tmp_path):
    with pytest.raises(ConfigError, match="line 1: key chosen: missing"):
        build(data, tmp_path, [{"messages": [ASKED, said(GOOD)]}])

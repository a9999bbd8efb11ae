"""Documents that hold a run of words of an evaluation set go."""

from __future__ import annotations

import gzip
import json

import pytest

from equilibrium_mcore.config.errors import ConfigError

QUESTION = (
    "A farmer has 17 sheep and all but nine run away in the night; how many sheep does the farmer "
    "have left on the next morning?"
)
SHORT = "Which planet is closest to the sun, then?"
TINY = "True or false?"


@pytest.fixture
def references(tmp_path):
    path = tmp_path / "exam.jsonl"
    lines = [
        {"question": QUESTION, "choices": ["nine sheep", "none at all"]},
        {"question": SHORT, "choices": [TINY]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ask(reason, references, text, **more):
    settings = dict(type="decontamination", references=[str(references)], fields=["question"])
    return reason(text, **settings, **more)


def test_a_run_of_thirteen_words_is_found_in_any_dress(reason, references):
    run = QUESTION.split()[3:16]
    inside = f"Long before. {' '.join(run).upper()}!! And after."
    assert ask(reason, references, inside) == "found in exam.jsonl"
    other = f"{' '.join(QUESTION.split()[:14]).replace('17', '23')} And after."
    assert ask(reason, references, other) is None
    prose = ["case", "numbers", "punctuation", "accents"]
    assert ask(reason, references, other, ignore=prose) == "found in exam.jsonl"
    for twelve in (run[1:], run[:-1], [*run[:6], "old", *run[6:]]):
        assert ask(reason, references, f"Long before. {' '.join(twelve)} and after.") is None
    assert ask(reason, references, f"Before {' '.join(run[1:])}", ngram_words=12) is not None


def test_short_references_are_found_as_a_whole(reason, references):
    assert ask(reason, references, f"Quiz: {SHORT} Mercury.") == "found in exam.jsonl"
    assert ask(reason, references, "Which planet is closest to the sun?") is None
    assert ask(reason, references, f"Quiz: {SHORT}", min_words=9) is None
    assert ask(reason, references, f"{TINY} nine sheep") is None


CHINESE = "下列关于光合作用的说法中哪一项是正确的请选择一个最合适的答案并且说明理由"


def test_text_without_spaces_is_found(chain, tmp_path):
    path = tmp_path / "exam_zh.jsonl"
    texts = [CHINESE, "对还是错？", SHORT, TINY]
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    filters = chain(type="decontamination", references=[str(path)], fields=["question"])
    inside = filters.process(f"网页上的一段文字，{CHINESE}。后面也有别的内容。", {})
    assert inside.dropped is not None
    assert (
        filters.process(f"网页上的一段文字，{CHINESE[:12]}。后面也有别的内容。", {}).dropped is None
    )
    assert filters.notes() == [
        f"decontamination: {path}: 2 of 4 references have fewer than min_words=8 words and are not "
        "looked for"
    ]


def test_matches_needed(reason, references):
    run = " ".join(QUESTION.split()[:15])  # three n-grams of 13
    assert ask(reason, references, run, min_matches=3) is not None
    assert ask(reason, references, run, min_matches=4) is None
    assert ask(reason, references, f"{' '.join(run.split()[:13])} {run}", min_matches=4) is None


def test_gzip_and_several_files_name_the_one_that_was_found(reason, references, tmp_path):
    other = tmp_path / "other.jsonl.gz"
    with gzip.open(other, "wt") as stream:
        stream.write(
            json.dumps({"question": "one two three four five six seven eight nine"}) + "\n"
        )
    settings = dict(type="decontamination", fields=["question"])
    settings["references"] = [str(references), str(other)]
    text = "zero one two three four five six seven eight nine ten"
    assert reason(text, **settings) == "found in other.jsonl.gz"
    assert reason(text.replace("five", "5"), **settings) is None


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        ('{"text": "x"}', ["question"], "line 1: no text under question; it has 'text'"),
        ('{"question": 3}', ["question"], "line 1: no text under question"),
        ("{", ["question"], "line 1: not JSON"),
        ("[]", ["question"], "line 1: not a JSON object"),
        ('{"question": "too short"}', ["question"], "no text of at least min_words=8 words"),
    ],
)
def test_bad_references(chain, tmp_path, line, fields, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        chain(type="decontamination", references=[str(path)], fields=fields)


def test_missing_references(chain, tmp_path):
    with pytest.raises(ConfigError, match=r"references=.*no\.jsonl does not exist"):
        chain(type="decontamination", references=[str(tmp_path / "no.jsonl")])

"""Each rule: one document that must go, and one near it that must stay."""

from __future__ import annotations

import random

import pytest

from tests.corpus.filters.conftest import PROSE

GERMAN = (
    "Der Fluss entspringt in den Hügeln nördlich der Stadt und wendet sich unterhalb der alten "
    "Brücke nach Westen. Im Frühjahr ist das Wasser hoch und braun, die Boote müssen warten."
)
LINES = PROSE.splitlines()


def words(count: int) -> str:
    """So many different words, two of them stop words."""
    return " ".join(
        ["the", "and", *(f"word{chr(97 + i % 26)}{'x' * (i // 26)}" for i in range(count - 2))]
    )


# (settings, what goes, its reason, what stays)
CASES = {
    "length: short": (
        dict(type="length", min_length=5),
        "1234",
        "fewer than 5 characters",
        "12345",
    ),
    "length: long": (
        dict(type="length", max_length=5),
        "123456",
        "more than 5 characters",
        "12345",
    ),
    "length: words": (
        dict(type="length", unit="words", min_length=3),
        "two  words",
        "fewer than 3 words",
        "these three words",
    ),
    "quality: length": (
        dict(type="quality", min_length=100, max_length=100_000),
        "x" * 99,
        "fewer than 100 characters",
        "x" * 100,
    ),
    "quality: rules": (
        dict(type="quality", rules=["gopher_quality"]),
        words(49),
        "gopher_quality: gopher_short_doc",
        words(50),
    ),
    "language": (dict(type="language", languages=["en"]), GERMAN, "language de", PROSE),
    "language: confidence": (
        dict(type="language", languages=["en"], min_confidence=0.95),
        "the taxi",
        "less than 0.95 sure of its language",
        PROSE,
    ),
    "gopher_quality: few words": (
        dict(type="gopher_quality"),
        words(49),
        "gopher_short_doc",
        words(50),
    ),
    "gopher_quality: many words": (
        dict(type="gopher_quality", max_words=60),
        words(61),
        "gopher_long_doc",
        words(60),
    ),
    "gopher_quality: short words": (
        dict(type="gopher_quality", min_words=1),
        "the and " + "a b c d e f g h " * 2,
        "gopher_below_avg_threshold",
        "the and " + "ace bed cat dog elf fog gap hat " * 2,
    ),
    "gopher_quality: long words": (
        dict(type="gopher_quality", min_words=1),
        "the and " + "internationalization " * 5,
        "gopher_above_avg_threshold",
        "the and " + "nations " * 5,
    ),
    "gopher_quality: hashes": (
        dict(type="gopher_quality", min_words=1, min_alphabetic_words=0),
        PROSE + "# # " * 10,
        "gopher_too_many_hashes",
        PROSE + "# ",
    ),
    "gopher_quality: ellipses": (
        dict(type="gopher_quality", min_alphabetic_words=0),
        PROSE.replace(" the ", "... the "),
        "gopher_too_many_ellipsis",
        PROSE.replace(" the old", "... the old"),
    ),
    "gopher_quality: bullets": (
        dict(type="gopher_quality"),
        "".join(f"- {line}\n" for line in LINES),
        "gopher_too_many_bullets",
        "".join(f"- {line}\n" for line in LINES[1:]) + LINES[0],
    ),
    "gopher_quality: lines that break off": (
        dict(type="gopher_quality"),
        "".join(f"{line}{'..' if i < 2 else ''}\n" for i, line in enumerate(LINES)),
        "gopher_too_many_end_ellipsis",
        "".join(f"{line}{'..' if i < 1 else ''}\n" for i, line in enumerate(LINES)),
    ),
    "gopher_quality: letters": (
        dict(type="gopher_quality"),
        PROSE + " 1 2 3 4 5 6 7 8 9 10" * 3,
        "gopher_below_alpha_threshold",
        PROSE + " 1 2 3",
    ),
    "gopher_quality: stop words": (
        dict(type="gopher_quality"),
        GERMAN * 2,
        "gopher_enough_stop_words",
        PROSE,
    ),
    "gopher_quality: stop words of a language": (
        dict(type="gopher_quality", stop_words=["der", "und"]),
        PROSE,
        "gopher_enough_stop_words",
        GERMAN * 2,
    ),
    "gopher_repetition: lines": (
        dict(type="gopher_repetition", max_duplicate_paragraphs=0),
        "\n".join([*LINES, "yes", "yes", "yes", "yes"]),
        "dup_line_frac",
        "\n".join([*LINES, "yes", "yes", "no"]),
    ),
    "gopher_repetition: characters of lines": (
        dict(type="gopher_repetition"),
        "\n".join(["One.", "Two.", "Three.", LINES[0], LINES[0]]),
        "dup_line_char_frac",
        "\n".join(["One.", "Two.", "Three.", LINES[0], LINES[1]]),
    ),
    "gopher_repetition: paragraphs": (
        dict(type="gopher_repetition"),
        "\n\n".join([*LINES[:2], "yes", "yes", "yes"]),
        "dup_para_frac",
        "\n\n".join([*LINES[:2], "yes", "no"]),
    ),
    "gopher_repetition: the most frequent words": (
        dict(type="gopher_repetition", max_duplicate_ngram_characters={}),
        "buy now " * 10 + "while it lasts",
        "top_2_gram",
        PROSE,
    ),
    "gopher_repetition: repeated words": (
        dict(type="gopher_repetition", max_top_ngram_characters={}),
        f"{LINES[0]} {LINES[0]}",
        "duplicated_5_n_grams",
        f"{LINES[0]} {LINES[1]}",
    ),
    "c4: sentences": (
        dict(type="c4"),
        "".join(f"{line}\n" for line in LINES[:3]),
        "too_few_sentences",
        PROSE,
    ),
    "c4: lorem ipsum": (
        dict(type="c4"),
        PROSE + "And then lorem ipsum follows.",
        "lorem_ipsum",
        PROSE + "And then ipsum follows.",
    ),
    "c4: code": (
        dict(type="c4"),
        PROSE + "It is written { like this.",
        "curly_bracket",
        PROSE + "It is written ( like this.",
    ),
    "fineweb: punctuation": (
        dict(type="fineweb"),
        PROSE.replace(".\n", "\n"),
        "line_punct_ratio",
        PROSE.replace(".\n", "\n", 3),
    ),
    "fineweb: short lines": (
        dict(type="fineweb"),
        "It is a line so.\nAnd here one more.\nA third is here.\n" + LINES[0],
        "short_line_ratio",
        "It is a line so.\nAnd here one more.\n" + "\n".join(LINES[:2]),
    ),
    "fineweb: repeated lines": (
        dict(type="fineweb"),
        PROSE + LINES[0],
        "char_dup_ratio",
        PROSE + "Another line ends it all now.",
    ),
    "fineweb: lists": (
        dict(type="fineweb", max_short_lines=1),
        "One.\nTwo.\nThree.\nFour five.",
        "list_ratio",
        "One is here now.\nTwo are here as well.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name, reason):
    settings, goes, why, stays = CASES[name]
    assert reason(goes, **settings) == why
    assert reason(stays, **settings) is None


@pytest.mark.parametrize("rules", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_prose_passes_every_rule_and_odd_texts_stop_nothing(rules, reason):
    settings = dict(type=rules)
    assert reason(PROSE, **settings) is None
    lax = {
        "gopher_quality": dict(min_words=0, min_stop_words=0),
        "c4": dict(min_sentences=0),
    }.get(rules, {})
    for text in ("", " \n\t ", ".", "...", "\u0000", "日本語", "a", "\ud83d half a pair", "\n.\n"):
        reason(text, **settings, **lax)
    assert reason(" \n", **settings) == "no text"


def test_c4_takes_lines_out(chain):
    text = (
        PROSE
        + "Menu\nHome About\nEnable javascript to see this page well.\nWe use cookies to know "
        "you better.\nAs was shown before [12], it holds.\n"
    )
    outcome = chain(type="c4").process(text, {})
    assert outcome.dropped is None
    assert outcome.text == PROSE + "As was shown before , it holds."


@pytest.mark.parametrize(
    ("switch", "line"),
    [
        ({"require_terminal_punctuation": False}, "A line that just breaks off"),
        ({"min_words_per_line": 2}, "Home about."),
        ({"remove_javascript_lines": False}, "Enable javascript to see this page well."),
        ({"remove_policy_lines": False}, "We use cookies to know you better."),
        ({"max_word_length": 1001}, f"It ends with a word: {'x' * 1000}."),
    ],
)
def test_c4_takes_a_line_out_for_one_reason(switch, line, chain):
    text = PROSE + line
    assert chain(type="c4").process(text, {}).text == PROSE.strip()
    assert chain(type="c4", **switch).process(text, {}).text == text
    citation = PROSE + "As was shown before [12], it holds."
    assert chain(type="c4", remove_citations=False).process(citation, {}).text == citation


def test_length_in_tokens(chain, tokenizer):
    text = "def encode(self, text):"
    count = len(tokenizer.encode(text))
    for limit, dropped in ((count, False), (count + 1, True)):
        filters = chain(type="length", unit="tokens", min_length=limit, tokenizer=tokenizer)
        assert (filters.process(text, {}).dropped is not None) == dropped


def test_language_is_told_from_all_of_a_long_document(reason):
    settings = dict(type="language", languages=["en"], max_characters=800)
    assert reason(GERMAN + PROSE * 50, **settings) is None
    assert reason(PROSE + GERMAN * 50, **settings) == "language de"


@pytest.mark.slow
def test_language_of_short_text(chain, stdlib_texts, capsys):
    """The shares that docs/reference/filters.md has. Run with -s to see them."""
    generator = random.Random(0)
    filters = chain(type="language", languages=["en"])
    shares = []
    for length in (20, 40, 80, 160):
        kept = []
        for text in map(" ".join, map(str.split, stdlib_texts["prose"] * 4)):
            if len(text) >= length + 200:
                start = generator.randrange(100, len(text) - length)
                kept.append(filters.process(text[start : start + length], {}).dropped is None)
        shares.append(sum(kept) / len(kept))
        with capsys.disabled():
            print(f"\n{length} characters: {shares[-1]:.2f} of {len(kept)} kept", end="")
    assert shares == sorted(shares) and shares[-1] > 0.85

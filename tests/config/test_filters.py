"""Settings of filters: what is read, and what is said about what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibrium_mcore.config import describe
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.filters import (
    FILTER_CLASSES,
    DeduplicationConfig,
    LanguageConfig,
    QualityConfig,
    filter_from_text,
    parse_filters,
)
from equilibrium_mcore.config.yaml_io import parse_yaml

ROADMAP = """
- type: "language"
  languages: ["en"]
- type: "quality"
  min_length: 100
  max_length: 100000
- type: "deduplication"
  method: "minhash"
- type: "pii_removal"
  enabled: true
"""


def test_filters_of_a_mixture():
    language, quality, duplicates, personal = parse_filters(parse_yaml(ROADMAP, source="test"))
    assert language == LanguageConfig(languages=["en"])
    assert quality == QualityConfig(min_length=100, max_length=100_000)
    assert duplicates == DeduplicationConfig(method="minhash") and duplicates.bands == 14
    assert personal.enabled and personal.type == "pii_removal"


@pytest.mark.parametrize("kind", FILTER_CLASSES)
def test_every_filter_is_documented_and_can_be_switched_off(kind):
    section = FILTER_CLASSES[kind]
    assert section.__doc__ and section.__doc__.splitlines()[0].endswith(".")
    assert section.model_fields["enabled"].default is True
    assert all(field.description for field in section.model_fields.values())


# What is written in YAML, and what is said about it.
PROBLEMS = {
    "{type: lenght}": "filters.0.type='lenght': must be one of 'length', ",
    "{min_length: 3}": "filters.0.type: missing; it says which kind of section this is",
    "length": "filters.0='length': must be a mapping of `key: value` lines",
    "{type: length}": "filters.0: nothing to check: give min_length, max_length",
    "{type: length, min_length: 9, max_length: 3}": (
        "filters.0: min_length=9 is more than max_length=3: nothing would be kept"
    ),
    "{type: length, min_len: 3}": (
        "filters.0.min_len: unknown key; did you mean 'min_length'?; allowed keys here: type"
    ),
    "{type: length, min_length: -1}": "filters.0.min_length=-1: must be at least 0 (fewer are",
    "{type: length, min_length: '3'}": "filters.0.min_length='3': must be a whole number, not text",
    "{type: quality}": "filters.0: nothing to check: give min_length, max_length or rules",
    "{type: quality, rules: [c5]}": "filters.0.rules.0='c5': must be one of 'gopher_quality', ",
    "{type: quality, rules: [c4], min_length: 9, max_length: 3}": "nothing would be kept",
    "{type: language}": "filters.0.languages: missing, and it has no default (ISO 639-1 codes",
    "{type: language, languages: []}": "filters.0.languages: needs at least 1 item(s)",
    "{type: language, languages: [en], library: fasttext}": (
        "filters.0: library='fasttext' with model=null: fasttext needs model: PATH"
    ),
    "{type: language, languages: [en], model: lid.bin}": "with model='lid.bin'",
    "{type: gopher_repetition, max_top_ngram_characters: {two: 0.2}}": (
        "filters.0: max_top_ngram_characters has 'two': n must be a whole number from 2"
    ),
    "{type: perplexity, model: m}": "nothing to check: give min_perplexity, max_perplexity",
    "{type: educational, min_score: 2}": "filters.0.min_score=2: must be at most 1",
    "{type: pii_removal, kinds: [name]}": "filters.0.kinds.0='name': must be one of 'email', ",
    "{type: pii_removal, enabled: 1}": "filters.0.enabled=1: must be true or false",
    "{type: deduplication, method: fuzzy}": "filters.0.method='fuzzy': must be one of 'exact', ",
    "{type: deduplication, max_distance_bits: 16}": "must be at most 15",
    "{type: decontamination, references: [a], ngram_words: 5}": (
        "filters.0: min_words=8 is more than ngram_words=5: use 1 to 5"
    ),
}


@pytest.mark.parametrize("text", PROBLEMS)
def test_problem(text):
    with pytest.raises(ConfigError) as caught:
        parse_filters([parse_yaml(text, source="test")])
    assert any(PROBLEMS[text] in problem for problem in caught.value.problems), caught.value


def test_all_problems_of_all_filters_are_told():
    with pytest.raises(ConfigError) as caught:
        parse_filters([{"type": "c5"}, {"type": "c4", "min_sentences": -1, "x": 1}, {"type": "c4"}])
    assert len(caught.value.problems) == 3


def test_filters_from_the_command_line():
    text = "type=language,languages=[en, de],min_confidence=0.5"
    assert filter_from_text(text) == {
        "type": "language",
        "languages": ["en", "de"],
        "min_confidence": 0.5,
    }
    text = "type=pii_removal,replacements={email: 'a, b', phone: \"]\"},kinds=[email,phone]"
    assert filter_from_text(text) == {
        "type": "pii_removal",
        "replacements": {"email": "a, b", "phone": "]"},
        "kinds": ["email", "phone"],
    }
    assert filter_from_text("type=perplexity,model=a=b.bin")["model"] == "a=b.bin"
    (only,) = parse_filters([filter_from_text("type=perplexity,model=a.bin,max_perplexity=3")])
    assert only.model == Path("a.bin") and only.max_perplexity == 3


@pytest.mark.parametrize("text", ["length", "type=length,", "type=length,,min_length=3", "=3"])
def test_words_that_are_no_filter(text):
    with pytest.raises(ConfigError, match="is no key=value"):
        filter_from_text(text)


def test_document_is_up_to_date():
    document = describe.FILTERS_DOCUMENT.read_text(encoding="utf-8")
    assert describe.up_to_date(document, describe.describe_filters) == document, (
        "docs/reference/filters.md differs from the schema; bring it up to date with "
        "`python -m equilibrium_mcore.config.describe`"
    )
    assert all(f"### `{kind}`" in document for kind in FILTER_CLASSES)

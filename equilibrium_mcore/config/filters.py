"""Settings of the document filters, one class per `type`; as tables in docs/reference/filters.md.

A list of filters is a list of `FilterConfig`; `parse_filters` reads one from plain values, and
`filter_from_text` from a command line's `type=...,key=value`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
    setting,
)
from equilibrium_mcore.config.section_text import section_from_text

HeuristicRules = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"]
PersonalDataKind = Literal["email", "ip_address", "phone", "credit_card"]
Ignored = Literal["case", "numbers", "punctuation", "accents"]

_ENABLED = "false: the filter is left out"
_WORDS = (
    "how text is cut into words and sentences: `unicode` needs nothing; a language code of "
    "datatrove (e.g. eng, zho) takes its tokenizer for that language, which needs spaCy or another"
)
_IGNORED = (
    "what does not count when texts are compared: case, numbers (each is 0: for prose alone, since "
    "sums become one), punctuation, accents"
)


class LengthConfig(Section):
    """Drops documents that are too short or too long."""

    type: Literal["length"] = setting("length", "which filter")
    enabled: bool = setting(True, _ENABLED)
    unit: Literal["characters", "words", "tokens"] = setting(
        "characters", "what is counted; words are split at white space, tokens are the tokenizer's"
    )
    min_length: NonNegativeInt | None = setting(None, "fewer are dropped")
    max_length: PositiveInt | None = setting(None, "more are dropped")

    @model_validator(mode="after")
    def _bounds(self) -> LengthConfig:
        _check_bounds(self, "min_length", "max_length")
        return self


class QualityConfig(Section):
    """Drops by length in characters, and by sets of published rules with their default limits."""

    type: Literal["quality"] = setting("quality", "which filter")
    enabled: bool = setting(True, _ENABLED)
    min_length: NonNegativeInt | None = setting(None, "documents with fewer characters are dropped")
    max_length: PositiveInt | None = setting(None, "documents with more characters are dropped")
    rules: list[HeuristicRules] = setting(
        [], "sets of rules, in this order; to change their limits, use the filter of that type"
    )
    word_tokenizer: str = setting("unicode", _WORDS)

    @model_validator(mode="after")
    def _bounds(self) -> QualityConfig:
        if not self.rules:
            _check_bounds(self, "min_length", "max_length", otherwise="rules")
        elif self.min_length is not None or self.max_length is not None:
            _check_bounds(self, "min_length", "max_length")
        return self


class LanguageConfig(Section):
    """Keeps documents in the given languages."""

    type: Literal["language"] = setting("language", "which filter")
    enabled: bool = setting(True, _ENABLED)
    languages: list[str] = setting(doc="ISO 639-1 codes to keep, e.g. [en, de]", min_length=1)
    min_confidence: Fraction = setting(0.65, "probability of the language; less is dropped")
    library: Literal["py3langid", "fasttext"] = setting(
        "py3langid", "py3langid ships its model; fasttext reads the one named in `model`"
    )
    model: UserPath | None = setting(None, "fasttext: a model file such as lid.176.bin")
    max_characters: PositiveInt = setting(
        4000, "characters looked at, in evenly spaced pieces of a longer document"
    )

    @model_validator(mode="after")
    def _model_fits(self) -> LanguageConfig:
        if (self.library == "fasttext") != (self.model is not None):
            raise ValueError(
                f"library={self.library!r} with model={_shown(self.model)}: fasttext needs model: "
                "PATH (a downloaded lid.176.bin), py3langid takes none"
            )
        return self


class GopherQualityConfig(Section):
    """Gopher's rules for prose: lengths, symbols, bullets, stop words. arXiv 2112.11446, A.1.1."""

    type: Literal["gopher_quality"] = setting("gopher_quality", "which filter")
    enabled: bool = setting(True, _ENABLED)
    min_words: NonNegativeInt = setting(50, "fewest words, punctuation not counted; 0: no rule")
    max_words: NonNegativeInt = setting(100_000, "most words; 0: no rule")
    min_mean_word_length: NonNegativeFloat = setting(3, "shortest mean word; 0: no rule")
    max_mean_word_length: NonNegativeFloat = setting(10, "longest mean word; 0: no rule")
    max_symbols_per_word: NonNegativeFloat = setting(
        0.1, "most `#` per word, and most ellipses per word; 0: no rule"
    )
    max_bullet_lines: Fraction = setting(0.9, "largest share of lines with a bullet; 0: no rule")
    max_ellipsis_lines: Fraction = setting(
        0.3, "largest share of lines that end in an ellipsis; 0: no rule"
    )
    min_alphabetic_words: Fraction = setting(
        0.8, "smallest share of words with a letter in them; 0: no rule"
    )
    min_stop_words: NonNegativeInt = setting(2, "different stop words needed; 0: no rule")
    stop_words: list[str] = setting(
        ["the", "be", "to", "of", "and", "that", "have", "with"],
        "stop words; English unless given",
    )
    word_tokenizer: str = setting("unicode", _WORDS)


class GopherRepetitionConfig(Section):
    """Gopher's rules against repetition, as shares of the document. arXiv 2112.11446, Table A1."""

    type: Literal["gopher_repetition"] = setting("gopher_repetition", "which filter")
    enabled: bool = setting(True, _ENABLED)
    max_duplicate_lines: Fraction = setting(0.3, "share of lines; 0: no rule")
    max_duplicate_paragraphs: Fraction = setting(0.3, "share of paragraphs; 0: no rule")
    max_duplicate_line_characters: Fraction = setting(0.2, "share of characters; 0: no rule")
    max_duplicate_paragraph_characters: Fraction = setting(0.2, "share of characters; 0: no rule")
    max_top_ngram_characters: dict[str, Fraction] = setting(
        {"2": 0.2, "3": 0.18, "4": 0.16},
        "by n: share of characters in the most frequent n words; {}: no rule",
    )
    max_duplicate_ngram_characters: dict[str, Fraction] = setting(
        {"5": 0.15, "6": 0.14, "7": 0.13, "8": 0.12, "9": 0.11, "10": 0.1},
        "by n: share of characters in n words seen before; {}: no rule",
    )
    word_tokenizer: str = setting("unicode", _WORDS)

    @model_validator(mode="after")
    def _keys_are_numbers(self) -> GopherRepetitionConfig:
        for name in ("max_top_ngram_characters", "max_duplicate_ngram_characters"):
            for key in getattr(self, name):
                if not key.isdecimal() or int(key) < 2:
                    raise ValueError(f"{name} has {key!r}: n must be a whole number from 2")
        return self


class C4Config(Section):
    """C4's rules: keeps lines that are sentences, drops pages of few. arXiv 1910.10683, 2.2."""

    type: Literal["c4"] = setting("c4", "which filter")
    enabled: bool = setting(True, _ENABLED)
    min_sentences: NonNegativeInt = setting(5, "fewer are dropped, after lines were removed")
    min_words_per_line: NonNegativeInt = setting(3, "shorter lines are removed")
    max_word_length: PositiveInt = setting(1000, "lines with a longer word are removed")
    require_terminal_punctuation: bool = setting(
        True, "lines without . ? ! or a quotation mark at their end are removed"
    )
    remove_citations: bool = setting(True, "marks like [12] and [citation needed] are removed")
    remove_javascript_lines: bool = setting(True, "lines with the word javascript are removed")
    remove_policy_lines: bool = setting(True, "lines on cookies and terms of use are removed")
    drop_lorem_ipsum: bool = setting(True, "documents with lorem ipsum are dropped")
    drop_curly_brackets: bool = setting(True, "documents with { are dropped, so code is too")
    word_tokenizer: str = setting("unicode", _WORDS)


class FineWebConfig(Section):
    """FineWeb's own rules on lines and lists. arXiv 2406.17557, section 3.6."""

    type: Literal["fineweb"] = setting("fineweb", "which filter")
    enabled: bool = setting(True, _ENABLED)
    min_terminal_punctuation_lines: Fraction = setting(
        0.12, "smallest share of lines that end in punctuation"
    )
    max_short_lines: Fraction = setting(0.67, "largest share of short lines")
    short_line_characters: PositiveInt = setting(30, "a line of so many characters is short")
    max_duplicate_line_characters: Fraction = setting(
        0.01, "largest share of characters in lines seen before"
    )
    max_newlines_per_word: NonNegativeFloat = setting(0.3, "more is a list")
    word_tokenizer: str = setting("unicode", _WORDS)


class PerplexityConfig(Section):
    """Drops by perplexity under an n-gram model: high is unlike the text it was trained on."""

    type: Literal["perplexity"] = setting("perplexity", "which filter")
    enabled: bool = setting(True, _ENABLED)
    model: UserPath = setting(
        doc="a .safetensors of tools/train_perplexity_model.py (perplexity per character), or a "
        "KenLM model (.arpa, .bin; per token)"
    )
    min_perplexity: PositiveFloat | None = setting(None, "less is dropped: repeated boilerplate")
    max_perplexity: PositiveFloat | None = setting(None, "more is dropped")
    sentencepiece_model: UserPath | None = setting(
        None, "KenLM: the .sp.model that cuts text for it, as CCNet's models need; null: words"
    )

    @model_validator(mode="after")
    def _bounds(self) -> PerplexityConfig:
        _check_bounds(self, "min_perplexity", "max_perplexity")
        return self


class EducationalConfig(Section):
    """Drops what a classifier scores low: educational value, or whatever it was trained on."""

    type: Literal["educational"] = setting("educational", "which filter")
    enabled: bool = setting(True, _ENABLED)
    model: UserPath = setting(
        doc="a .safetensors of tools/train_quality_classifier.py, or a fastText classifier (.bin)"
    )
    min_score: Fraction = setting(0.5, "probability of the positive class; less is dropped")
    positive_label: str = setting("__label__hq", "fastText: the label of the positive class")


class PiiRemovalConfig(Section):
    """Replaces personal data in the text; drops nothing."""

    type: Literal["pii_removal"] = setting("pii_removal", "which filter")
    enabled: bool = setting(True, _ENABLED)
    kinds: list[PersonalDataKind] = setting(
        ["email", "ip_address", "phone", "credit_card"], "what is replaced", min_length=1
    )
    replacements: dict[PersonalDataKind, str] = setting(
        {}, "text to put in place of a kind, instead of the default"
    )


class DeduplicationConfig(Section):
    """Drops documents that repeat an earlier one; the first in reading order stays."""

    type: Literal["deduplication"] = setting("deduplication", "which filter")
    enabled: bool = setting(True, _ENABLED)
    method: Literal["exact", "minhash", "simhash"] = setting(
        "exact", "same text; similar sets of word n-grams; similar 64-bit fingerprints"
    )
    normalize: Literal["none", "whitespace", "simplified"] = setting(
        "whitespace",
        "exact: what is made equal first; simplified: white space, and what `ignore` names",
    )
    ignore: list[Ignored] = setting(
        ["case", "punctuation", "accents"], f"minhash, simhash, exact with simplified: {_IGNORED}"
    )
    shingle_words: PositiveInt = setting(5, "minhash: words of an n-gram")
    bands: PositiveInt = setting(14, "minhash: bands; one equal band is a duplicate")
    rows: PositiveInt = setting(8, "minhash: hashes per band; caught at about (1/bands)^(1/rows)")
    seed: NonNegativeInt = setting(1, "minhash: seed of the hash functions")
    simhash_words: PositiveInt = setting(2, "simhash: words of an n-gram")
    max_distance_bits: Annotated[int, Field(ge=0, le=15)] = setting(
        6, "simhash: of 64 bits, in how many duplicates may differ"
    )


class DecontaminationConfig(Section):
    """Drops documents that share an n-gram of words with evaluation sets. arXiv 2005.14165, C."""

    type: Literal["decontamination"] = setting("decontamination", "which filter")
    enabled: bool = setting(True, _ENABLED)
    references: list[UserPath] = setting(
        doc="JSONL files (.gz too) of evaluation sets", min_length=1
    )
    fields: list[str] = setting(
        ["text"], "keys of the references that hold text; a line needs one of them", min_length=1
    )
    ignore: list[Ignored] = setting(["case", "punctuation", "accents"], _IGNORED)
    ngram_words: PositiveInt = setting(
        13,
        "words of an n-gram; a character of a script without spaces (Chinese, Thai) is a word",
    )
    min_words: PositiveInt = setting(
        8, "a shorter reference is looked for as a whole if it has so many words, else left out"
    )
    min_matches: PositiveInt = setting(1, "n-grams that must be found for a document to go")

    @model_validator(mode="after")
    def _words(self) -> DecontaminationConfig:
        if self.min_words > self.ngram_words:
            raise ValueError(
                f"min_words={self.min_words} is more than ngram_words={self.ngram_words}: use 1 "
                f"to {self.ngram_words}"
            )
        return self


FilterConfig = Annotated[
    LengthConfig
    | QualityConfig
    | LanguageConfig
    | GopherQualityConfig
    | GopherRepetitionConfig
    | C4Config
    | FineWebConfig
    | PerplexityConfig
    | EducationalConfig
    | PiiRemovalConfig
    | DeduplicationConfig
    | DecontaminationConfig,
    Field(discriminator="type"),
]

FILTER_CLASSES: dict[str, type[Section]] = {
    kind.model_fields["type"].default: kind for kind in get_args(get_args(FilterConfig)[0])
}


class FilterList(Section):
    """Filters of a dataset, in the order in which they are applied."""

    filters: list[FilterConfig] = setting(doc="filters, in the order in which they are applied")


def parse_filters(values: Any, *, source: object = None) -> list[FilterConfig]:
    """The filters in `values`, a list of mappings. Raises ConfigError with every problem."""
    parsed = parse(FilterList, {"filters": values})
    if isinstance(parsed, FilterList):
        return parsed.filters
    raise ConfigError([problem.text for problem in parsed], source=source)


def filter_from_text(text: str) -> dict[str, Any]:
    """`type=language,languages=[en, de]` as plain values; the values are YAML.

    Raises ConfigError when a part is no `key=value`.
    """
    return section_from_text(
        text, kind="filter", example="type=length,min_length=100,max_length=100000"
    )


def _check_bounds(config: Section, low: str, high: str, *, otherwise: str = "") -> None:
    """Raises ValueError unless one of the bounds is given and they leave something between."""
    least, most = getattr(config, low), getattr(config, high)
    if least is None and most is None:
        more = f" or {otherwise}" if otherwise else ""
        raise ValueError(f"nothing to check: give {low}, {high}{more}")
    if least is not None and most is not None and least > most:
        raise ValueError(f"{low}={least} is more than {high}={most}: nothing would be kept")


def _shown(path: Path | None) -> str:
    return "null" if path is None else f"'{path}'"

"""Published rules for web text: Gopher, C4, FineWeb. The rules are datatrove's filter classes.

Here their settings get names, an empty text is dropped instead of being divided by, and a text
without words cannot stop a run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from equilibrium_mcore.config.filters import (
    C4Config,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LengthConfig,
    QualityConfig,
)
from equilibrium_mcore.config.schema import Section
from equilibrium_mcore.corpus.filters.base import DocumentFilter, Dropped
from equilibrium_mcore.corpus.filters.length import LengthFilter
from equilibrium_mcore.corpus.filters.optional import require

_EMPTY = Dropped("no text")


class DatatroveFilter(DocumentFilter):
    """One of datatrove's filter classes, given a text instead of a pipeline of documents."""

    module: str
    class_name: str

    def __init__(self, config: Section) -> None:
        """Raises MissingLibraryError, and ValueError for an unknown word tokenizer."""
        rules = getattr(require(self.module, wanted_by=self.name), self.class_name)
        words = require("equilibrium_mcore.corpus.filters.words", wanted_by=self.name)
        self._document = require("datatrove.data", wanted_by=self.name).Document
        self._rules = rules(
            language=words.word_tokenizer(config.word_tokenizer), **self.arguments(config)
        )

    @abstractmethod
    def arguments(self, config: Any) -> dict[str, Any]:
        """The settings under datatrove's names."""

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        if not text.strip():
            return _EMPTY
        document = self._document(text=text, id="")
        result = self._rules.filter(document)
        if result is True:
            return document.text
        return Dropped(result[1] if isinstance(result, tuple) else self.name)


class GopherQuality(DatatroveFilter):
    """See GopherQualityConfig."""

    name = "gopher_quality"
    module = "datatrove.pipeline.filters.gopher_quality_filter"
    class_name = "GopherQualityFilter"

    def arguments(self, config: GopherQualityConfig) -> dict[str, Any]:
        """See DatatroveFilter."""
        return dict(
            # Without a word there is no mean length: at least one is always asked for.
            min_doc_words=max(config.min_words, 1),
            max_doc_words=config.max_words,
            min_avg_word_length=config.min_mean_word_length,
            max_avg_word_length=config.max_mean_word_length,
            max_symbol_word_ratio=config.max_symbols_per_word,
            max_bullet_lines_ratio=config.max_bullet_lines,
            max_ellipsis_lines_ratio=config.max_ellipsis_lines,
            max_non_alpha_words_ratio=config.min_alphabetic_words,  # a minimum, despite its name
            min_stop_words=config.min_stop_words,
            stop_words=config.stop_words,
        )


class GopherRepetition(DatatroveFilter):
    """See GopherRepetitionConfig."""

    name = "gopher_repetition"
    module = "datatrove.pipeline.filters.gopher_repetition_filter"
    class_name = "GopherRepetitionFilter"

    def arguments(self, config: GopherRepetitionConfig) -> dict[str, Any]:
        """See DatatroveFilter."""
        return dict(
            dup_line_frac=config.max_duplicate_lines,
            dup_para_frac=config.max_duplicate_paragraphs,
            dup_line_char_frac=config.max_duplicate_line_characters,
            dup_para_char_frac=config.max_duplicate_paragraph_characters,
            top_n_grams=_by_n(config.max_top_ngram_characters),
            dup_n_grams=_by_n(config.max_duplicate_ngram_characters),
        )


class C4(DatatroveFilter):
    """See C4Config."""

    name = "c4"
    module = "datatrove.pipeline.filters.c4_filters"
    class_name = "C4QualityFilter"

    def arguments(self, config: C4Config) -> dict[str, Any]:
        """See DatatroveFilter."""
        return dict(
            min_num_sentences=config.min_sentences,
            min_words_per_line=config.min_words_per_line,
            max_word_length=config.max_word_length,
            filter_no_terminal_punct=config.require_terminal_punctuation,
            remove_citations=config.remove_citations,
            filter_javascript=config.remove_javascript_lines,
            filter_policy=config.remove_policy_lines,
            filter_lorem_ipsum=config.drop_lorem_ipsum,
            filter_curly_bracket=config.drop_curly_brackets,
        )

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter. All lines may have been removed where few sentences are allowed."""
        result = super().apply(text, fields)
        return result if result else Dropped("no line left")


class FineWeb(DatatroveFilter):
    """See FineWebConfig."""

    name = "fineweb"
    module = "datatrove.pipeline.filters.fineweb_quality_filter"
    class_name = "FineWebQualityFilter"

    def arguments(self, config: FineWebConfig) -> dict[str, Any]:
        """See DatatroveFilter."""
        return dict(
            line_punct_thr=config.min_terminal_punctuation_lines,
            short_line_thr=config.max_short_lines,
            short_line_length=config.short_line_characters,
            char_duplicates_ratio=config.max_duplicate_line_characters,
            new_line_ratio=config.max_newlines_per_word,
        )


_RULES = {
    "gopher_quality": (GopherQuality, GopherQualityConfig),
    "gopher_repetition": (GopherRepetition, GopherRepetitionConfig),
    "c4": (C4, C4Config),
    "fineweb": (FineWeb, FineWebConfig),
}


class QualityFilter(DocumentFilter):
    """Length in characters, then the sets of rules with their default limits, as one filter."""

    name = "quality"

    def __init__(self, config: QualityConfig) -> None:
        """Raises MissingLibraryError when rules are asked for and datatrove is missing."""
        self._parts: list[DocumentFilter] = []
        if config.min_length is not None or config.max_length is not None:
            bounds = LengthConfig(min_length=config.min_length, max_length=config.max_length)
            self._parts.append(LengthFilter(bounds))
        for rule in config.rules:
            build, settings = _RULES[rule]
            self._parts.append(build(settings(word_tokenizer=config.word_tokenizer)))

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        for part in self._parts:
            result = part.apply(text, fields)
            if isinstance(result, Dropped):
                rules = "" if isinstance(part, LengthFilter) else f"{part.name}: "
                return Dropped(rules + result.reason)
            text = result
        return text


def _by_n(limits: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """{"5": 0.15} as ((5, 0.15),), in the order of n."""
    return tuple(sorted((int(n), share) for n, share in limits.items()))

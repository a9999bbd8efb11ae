"""From settings to filters, with every file and library that is missing reported at once."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.filters import FilterConfig
from equilibrium_mcore.corpus.filters.base import FilterChain
from equilibrium_mcore.data.tokenizer import Tokenizer

# Imported when asked for: most of these libraries are in the extra `data`, and slow to import.
_ROOM = "equilibrium_mcore.corpus.filters"
_BUILDERS = {
    "length": ("length", "LengthFilter"),
    "quality": ("heuristics", "QualityFilter"),
    "language": ("language", "LanguageFilter"),
    "gopher_quality": ("heuristics", "GopherQuality"),
    "gopher_repetition": ("heuristics", "GopherRepetition"),
    "c4": ("heuristics", "C4"),
    "fineweb": ("heuristics", "FineWeb"),
    "perplexity": ("perplexity", "PerplexityFilter"),
    "educational": ("educational", "EducationalFilter"),
    "pii_removal": ("personal_data", "PersonalDataFilter"),
    "deduplication": ("deduplication", "deduplication_filter"),
    "decontamination": ("decontamination", "DecontaminationFilter"),
}


def build_filters(
    configs: Iterable[FilterConfig], *, tokenizer: Tokenizer | None = None
) -> FilterChain:
    """The filters in the order of `configs`, without those that are not enabled.

    `tokenizer` is asked for by `length` in tokens alone. Raises ConfigError with one problem per
    filter that cannot be built: a missing library (with the command that installs it), a missing or
    unreadable model, a missing tokenizer.
    """
    filters, problems = [], []
    for number, config in enumerate(configs):
        if not config.enabled:
            continue
        module, name = _BUILDERS[config.type]
        builder = getattr(importlib.import_module(f"{_ROOM}.{module}"), name)
        extra = {"tokenizer": tokenizer} if config.type == "length" else {}
        try:
            built = builder(config, **extra)
        except (ImportError, OSError, ValueError) as error:
            problems.append(f"filters.{number}: {error}")
            continue
        filters.extend(built if isinstance(built, list) else [built])
    if problems:
        raise ConfigError(problems)
    return FilterChain(filters)

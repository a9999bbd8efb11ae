"""What tools/try_filter.py does: filters from arguments and YAML, a trial, a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.filters import filter_from_text, parse_filters
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.corpus.filters.trial import try_filters
from equilibrium_mcore.corpus.filters.trial_report import FORMATS
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer


def report_trial(
    path: Path,
    *,
    filter_arguments: Sequence[str],
    filters: Path | None = None,
    output_format: str = "table",
    tokenizer_model: Path | None = None,
    sample: int = 1000,
    seed: int = 1234,
    text_field: str = "text",
    examples: int = 2,
) -> str:
    """The report on `filters` (a YAML file), then `filter_arguments` (type=...,key=value).

    Raises ConfigError, ValueError or OSError for what cannot be used.
    """
    values = []
    if filters is not None:
        held = read_mapping(filters)
        if not isinstance(held.get("filters"), list):
            raise ConfigError(
                f"filters: must be a list of filters; the file has {', '.join(held) or 'no keys'}",
                source=filters,
            )
        values += held["filters"]
    values += [filter_from_text(word) for word in filter_arguments]
    if not values:
        raise ConfigError(
            "no filter is given: add --filter type=length,min_length=100, or --filters FILE.yaml",
            source="the command line",
        )
    if sample < 0 or examples < 0:
        raise ConfigError(f"--sample {sample}, --examples {examples}: must be at least 0")
    trial = try_filters(
        path,
        parse_filters(values, source=filters),
        sample=sample,
        seed=seed,
        text_field=text_field,
        tokenizer=_tokenizer(tokenizer_model),
        examples=examples,
    )
    return FORMATS[output_format](trial)


def _tokenizer(model: Path | None) -> Tokenizer | None:
    if model is None:
        return None
    is_json = model.suffix == ".json" or (model / "tokenizer.json").is_file()
    kind = "HuggingFaceTokenizer" if is_json else "SentencePieceTokenizer"
    # Only its token count is wanted, so whichever token ends a document is of no matter.
    return load_tokenizer(TokenizerConfig(type=kind, model=model))

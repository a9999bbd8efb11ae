"""A mixture: which datasets, in which shares, filtered and sampled how, for which phase.

The form is that of `configs/data/**`: `metadata`, `datasets`, `validation`. Plain values, as in
`schema.py`; the rules that tie them together are in `mixture_rules.py`. What a mixture becomes,
a blend of indexed datasets, is `schema.DataConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.filters import FilterConfig
from equilibrium_mcore.config.load import apply_override
from equilibrium_mcore.config.mixture_files import find_mixture, mixture_name
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.schema import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    setting,
)
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.files.paths import expand_text

Share = Annotated[float, Field(gt=0, le=1)]
Phase = Literal[
    "pretrain",
    "pretrain_phase1",
    "pretrain_phase2",
    "midtrain_phase1",
    "midtrain_phase2",
    "posttrain_sft",
    "posttrain_dpo",
    "posttrain_reward_model",
    "posttrain_rlaif",
]
Kind = Literal["text", "conversation", "preference", "prompt"]
KINDS: dict[str, Kind] = {
    "posttrain_sft": "conversation",
    "posttrain_dpo": "preference",
    "posttrain_reward_model": "preference",
    "posttrain_rlaif": "prompt",
}
"""What a row becomes in each phase; every phase that is not listed trains on text."""


class MetadataConfig(Section):
    """What the mixture is for."""

    phase: Phase = setting(doc="the phase of training; posttrain phases become JSONL, not tokens")
    total_tokens: PositiveInt | None = setting(
        None, "tokens that the phase trains on; each dataset gives mix_ratio of them"
    )
    total_examples: PositiveInt | None = setting(
        None, "posttrain: examples in all, of which each dataset gives mix_ratio; null: all"
    )
    steps: PositiveInt | None = setting(None, "optimizer steps of the phase, for the report")
    description: str = setting("", "what the mixture is meant to do")
    max_seq_length: PositiveInt = setting(4096, "tokens per training sequence, for the report")


class ColumnsConfig(Section):
    """Where a row of a conversation or of a preference holds what."""

    messages: str | None = setting(
        None, "a list of turns, {role, content} or {from, value}; in a text phase joined to text"
    )
    system: str | None = setting(None, "the system prompt, beside the turns")
    prompt: str | None = setting(None, "the prompt, as text or as turns")
    context: str | None = setting(
        None, "text that belongs to the prompt, after a blank line; an empty one is left out"
    )
    response: str | None = setting(None, "sft: the answer to the prompt")
    chosen: str | None = setting(None, "preference: the better answer, transcript or turns")
    rejected: str | None = setting(None, "preference: the worse answer, transcript or turns")
    responses: list[str] = setting([], "preference: the fields of two answers, instead of chosen")
    preferred: str | None = setting(None, "preference: which of responses is better, 0 or 1")


class SamplingConfig(Section):
    """Which documents are taken when there are more than needed, and in which order."""

    method: Literal["uniform", "weighted", "curriculum"] = setting(
        "uniform",
        "uniform: a random part; weighted: by the quality in `field`; curriculum: from easy to "
        "hard by `field`, in stages",
    )
    temperature: PositiveFloat = setting(
        1.0, "shares become mix_ratio ** (1 / temperature), scaled to sum to 1; above 1 is flatter"
    )
    field: str | None = setting(
        None, "weighted: a number above 0; curriculum: a number; dots reach inside"
    )
    stages: PositiveInt = setting(3, "curriculum: stages of as many tokens each")
    boundaries: list[float] = setting(
        [], "curriculum: values of `field` at which a stage ends, instead of stages of equal size"
    )
    hardest_first: bool = setting(False, "curriculum: from high values of `field` to low")


class DatasetConfig(Section):
    """One dataset of the mixture."""

    name: str = setting(doc="letters, digits, _ . and -: names the files that are written")
    source: Annotated[str, AfterValidator(expand_text)] = setting(
        doc="a local file, folder or pattern (relative to where the tool runs), or the name of a "
        "dataset on the Hugging Face Hub, owner/name"
    )
    mix_ratio: Share = setting(doc="share of the phase's tokens; the shares sum to 1")
    estimated_tokens: PositiveInt | None = setting(
        None, "tokens that the dataset holds, as far as known: checked against max_epochs early"
    )
    format: Literal["jsonl", "parquet", "arrow", "hub"] | None = setting(
        None, "null: by the files' endings; hub: the Hub's library decides"
    )
    text_field: str = setting("text", "the field that holds the text; dots reach inside")
    text_template: str | None = setting(
        None, "several fields as one text, e.g. '{problem}\\n\\n{solution}'; instead of text_field"
    )
    columns: ColumnsConfig = ColumnsConfig()
    splits: list[str] = setting(["train"], "splits to read, of sources that have splits")
    subset: str | None = setting(None, "Hub: the dataset's configuration, e.g. sample-10BT")
    revision: str | None = setting(None, "Hub: branch, tag or commit")
    data_files: str | None = setting(
        None,
        "Hub: a pattern of files, e.g. data/v2/*.json.gz, read by `format`; for a dataset whose "
        "loading script today's `datasets` does not run",
    )
    streaming: bool = setting(
        False, "Hub: read over the network as it comes, without a download of everything first"
    )
    max_epochs: PositiveFloat = setting(
        4.0, "how often a document may be trained on; needing more is an error (arXiv 2305.16264)"
    )
    filters: list[FilterConfig] = setting([], "what is dropped or changed, in this order")
    sampling: SamplingConfig = SamplingConfig()


class ValidationConfig(Section):
    """The part that is held out."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = setting(0.01, "share of every dataset's documents")
    seed: NonNegativeInt = setting(42, "seed of the held-out part, of sampling and of order")


class MixtureConfig(Section):
    """A mixture of datasets for one phase of training."""

    name: str = setting(doc="what the mixture is called; default: its file's place")
    metadata: MetadataConfig
    tokenizer: TokenizerConfig | None = setting(
        None, "the tokenizer of text phases; --tokenizer-type and --tokenizer-model name one too"
    )
    datasets: list[DatasetConfig] = setting(
        doc="the datasets, in the order of deduplication", min_length=1
    )
    validation: ValidationConfig = ValidationConfig()

    @property
    def kind(self) -> Kind:
        """What a row becomes: text to tokenize, or a conversation, preference or prompt."""
        return KINDS.get(self.metadata.phase, "text")


def load_mixture(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    local: Sequence[str] = (),
    temperature: float | None = None,
) -> MixtureConfig:
    """The mixture in a YAML file, with `key=value` overrides, all rules checked.

    `path` may be relative to `configs/data`, with or without its ending. `local` holds
    `name=path`: that dataset is read from there. `temperature` sets that of every dataset.
    Raises ConfigError with every problem.
    """
    from equilibrium_mcore.config.mixture_rules import check_mixture

    file = find_mixture(path)
    values = read_mapping(file)
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(values, override, folder=file.parent)
        except ConfigError as error:
            problems += error.problems
    problems += _stand_in(values, local)
    if temperature is not None:
        for dataset in _datasets(values):
            dataset["sampling"] = {**(dataset.get("sampling") or {}), "temperature": temperature}
    values.setdefault("name", mixture_name(file))
    parsed = parse(MixtureConfig, values)
    if isinstance(parsed, list):
        problems += [problem.text for problem in parsed]
    elif not problems:
        problems += check_mixture(parsed)
    if problems:
        raise ConfigError(dict.fromkeys(problems), source=file)
    return parsed


def _datasets(values: dict[str, Any]) -> list[dict[str, Any]]:
    datasets = values.get("datasets")
    return [d for d in datasets if isinstance(d, dict)] if isinstance(datasets, list) else []


def _stand_in(values: dict[str, Any], local: Sequence[str]) -> list[str]:
    """Lay `name=path` over the datasets; what the Hub alone needs is taken away."""
    problems = []
    by_name = {dataset.get("name"): dataset for dataset in _datasets(values)}
    for item in local:
        name, equals, path = item.partition("=")
        if not equals or not path:
            problems.append(f"--local {item}: write NAME=PATH, e.g. --local code=data/code.jsonl")
        elif name not in by_name:
            known = ", ".join(str(key) for key in by_name)
            problems.append(f"--local {item}: the mixture has no dataset {name!r}; it has {known}")
        else:
            dataset = by_name[name]
            for key in ("format", "subset", "revision", "data_files", "streaming"):
                dataset.pop(key, None)
            dataset["source"] = path
    return problems

"""The rules that tie a mixture's settings together; each broken one says its way out."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from typing import get_args

from equilibrium_mcore.config.mixture import PHASE_KINDS, DatasetConfig, Kind, MixtureConfig

SUM_TOLERANCE = 1e-6
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")

MixtureRule = Callable[[MixtureConfig], Iterator[str]]
MIXTURE_RULES: list[MixtureRule] = []


def _rule(function: MixtureRule) -> MixtureRule:
    MIXTURE_RULES.append(function)
    return function


def check_mixture(mixture: MixtureConfig) -> list[str]:
    """Every broken rule, in words. Rules may ask for the kind, so that comes first."""
    unknown = list(a_phase_has_a_kind(mixture))
    if unknown:
        return unknown
    return [problem for rule in MIXTURE_RULES for problem in rule(mixture)]


def a_phase_has_a_kind(mixture: MixtureConfig) -> Iterator[str]:
    """What rows become follows from `kind`, or from a phase of a known name."""
    phase, kind = mixture.metadata.phase, mixture.metadata.kind
    if kind is None and phase not in PHASE_KINDS:
        yield (
            f"metadata.phase={phase!r}: rows of {', '.join(PHASE_KINDS)} are known; for a phase of "
            f"another name set metadata.kind to {', '.join(get_args(Kind))}"
        )


def effective_shares(mixture: MixtureConfig) -> list[float]:
    """Each dataset's share of the tokens: mix_ratio ** (1 / temperature), scaled to sum to 1."""
    raw = [d.mix_ratio ** (1 / d.sampling.temperature) for d in mixture.datasets]
    return [value / sum(raw) for value in raw]


@_rule
def ratios_sum_to_one(mixture: MixtureConfig) -> Iterator[str]:
    """The shares are shares."""
    total = sum(dataset.mix_ratio for dataset in mixture.datasets)
    if abs(total - 1) > SUM_TOLERANCE:
        terms = " + ".join(f"{d.mix_ratio:g} ({d.name})" for d in mixture.datasets)
        yield (
            f"datasets.*.mix_ratio: {terms} = {total:.6g}, must sum to 1; change them by "
            f"{1 - total:+.6g} in all"
        )


@_rule
def names_are_file_names(mixture: MixtureConfig) -> Iterator[str]:
    """Names are unique and make file names."""
    seen: set[str] = set()
    for place, dataset in enumerate(mixture.datasets):
        if not _NAME.fullmatch(dataset.name):
            yield (
                f"datasets.{place}.name={dataset.name!r}: it names files; use letters, digits, "
                f"_ . and -, and begin with a letter or digit"
            )
        if dataset.name.lower() in seen:
            yield f"datasets.{place}.name={dataset.name!r}: two datasets have this name; rename one"
        seen.add(dataset.name.lower())


@_rule
def a_budget_fits_its_phase(mixture: MixtureConfig) -> Iterator[str]:
    """Text has a budget of tokens, other kinds one of examples."""
    metadata = mixture.metadata
    if mixture.kind == "text" and metadata.total_tokens is None:
        yield (
            f"metadata.total_tokens: missing; the phase {metadata.phase} trains on text, and each "
            f"dataset's part is mix_ratio of total_tokens"
        )
    if mixture.kind == "text" and metadata.total_examples is not None:
        yield (
            f"metadata.total_examples={metadata.total_examples}: the phase {metadata.phase} counts "
            f"tokens; set metadata.total_tokens"
        )


@_rule
def sampling_has_its_field(mixture: MixtureConfig) -> Iterator[str]:
    """Weighted and curriculum sampling read a field; boundaries rise."""
    for place, dataset in enumerate(mixture.datasets):
        sampling, key = dataset.sampling, f"datasets.{place}.sampling"
        if sampling.method != "uniform" and not sampling.field:
            yield (
                f"{key}.field: missing; method {sampling.method!r} ({dataset.name}) needs the "
                f"field of a row that holds a number, e.g. field: score"
            )
        if sampling.boundaries != sorted(set(sampling.boundaries)):
            yield f"{key}.boundaries={sampling.boundaries}: must rise from one to the next"
        if sampling.boundaries and sampling.method != "curriculum":
            yield f"{key}.boundaries: only method 'curriculum' has stages; remove them"


@_rule
def stages_agree(mixture: MixtureConfig) -> Iterator[str]:
    """A stage is a blend of all datasets, so the curricula have as many stages each."""
    stages = {d.name: stages_of(d) for d in mixture.datasets if stages_of(d) > 1}
    if len(set(stages.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in stages.items())
        yield f"datasets.*.sampling.stages: {found}: all curricula of a mixture need as many stages"


@_rule
def temperatures_agree(mixture: MixtureConfig) -> Iterator[str]:
    """The temperature is one of the mixture."""
    found = {d.sampling.temperature for d in mixture.datasets}
    if len(found) > 1:
        values = ", ".join(f"{d.sampling.temperature:g} ({d.name})" for d in mixture.datasets)
        yield (
            f"datasets.*.sampling.temperature: {values}: shares are tempered together; use one "
            f"value, e.g. with --temperature"
        )


@_rule
def estimates_allow_the_epochs(mixture: MixtureConfig) -> Iterator[str]:
    """A dataset that is known to be too small is reported before anything is read."""
    total = mixture.metadata.total_tokens
    if total is None or mixture.kind != "text":
        return
    for dataset, share in zip(mixture.datasets, effective_shares(mixture), strict=True):
        held = dataset.estimated_tokens
        if held is None:
            continue
        problem = epoch_problem(
            dataset,
            share=share,
            total_tokens=total,
            held_tokens=held,
            ratio=mixture.validation.ratio,
        )
        if problem:
            yield problem


@_rule
def text_comes_from_one_place(mixture: MixtureConfig) -> Iterator[str]:
    """text_template names fields, and stands alone."""
    for place, dataset in enumerate(mixture.datasets):
        if dataset.text_template is None:
            continue
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(dataset.text_template)]
        except ValueError as error:
            yield f"datasets.{place}.text_template={dataset.text_template!r}: {error}"
            continue
        if not any(fields):
            yield (
                f"datasets.{place}.text_template={dataset.text_template!r}: it names no field; "
                f"write fields in braces, e.g. '{{question}}\\n\\n{{answer}}'"
            )


@_rule
def columns_fit_the_phase(mixture: MixtureConfig) -> Iterator[str]:
    """A dataset of turns or answers says where they are."""
    wanted = {
        "conversation": "columns.messages, or columns.prompt and columns.response",
        "preference": "columns.chosen and columns.rejected, or columns.prompt, columns.responses "
        "(two fields) and columns.preferred",
        "prompt": "columns.prompt or columns.messages",
    }
    if mixture.kind == "text":
        return
    for place, dataset in enumerate(mixture.datasets):
        if not _has_columns(dataset, mixture.kind):
            yield (
                f"datasets.{place}.columns ({dataset.name}): the phase {mixture.metadata.phase} "
                f"needs {wanted[mixture.kind]}"
            )


@_rule
def filters_fit_the_phase(mixture: MixtureConfig) -> Iterator[str]:
    """A filter that takes lines away works on text; of a turn it would leave half."""
    if mixture.kind == "text":
        return
    for place, dataset in enumerate(mixture.datasets):
        if any(config.type == "c4" and config.enabled for config in dataset.filters):
            yield (
                f"datasets.{place}.filters: c4 ({dataset.name}) removes lines, and the phase "
                f"{mixture.metadata.phase} has turns; use quality, length or language"
            )


@_rule
def hub_settings_are_for_the_hub(mixture: MixtureConfig) -> Iterator[str]:
    """Files of a Hub dataset are read by a format."""
    for place, dataset in enumerate(mixture.datasets):
        if dataset.data_files and dataset.format not in ("jsonl", "parquet", "arrow"):
            yield (
                f"datasets.{place}.data_files={dataset.data_files!r} ({dataset.name}): set format "
                f"to jsonl, parquet or arrow, so that it is known how to read them"
            )


def stages_of(dataset: DatasetConfig) -> int:
    """Stages of a dataset: 1 without a curriculum."""
    sampling = dataset.sampling
    if sampling.method != "curriculum":
        return 1
    return len(sampling.boundaries) + 1 if sampling.boundaries else sampling.stages


def epoch_problem(
    dataset: DatasetConfig, *, share: float, total_tokens: int, held_tokens: int, ratio: float
) -> str | None:
    """The arithmetic of a dataset that would be repeated too often, or None.

    `held_tokens` counts training and validation; `ratio` of them is held out.
    """
    needed = share * total_tokens
    for_training = held_tokens * (1 - ratio)
    epochs = needed / for_training if for_training else float("inf")
    if epochs <= dataset.max_epochs * (1 + 1e-9):
        return None
    possible = int(dataset.max_epochs * for_training / share)
    return (
        f"{dataset.name}: share {share:.6g} of {total_tokens:,} tokens is {needed:,.0f}; it holds "
        f"{held_tokens:,}, of which {for_training:,.0f} are for training, so {epochs:,.2f} epochs "
        f"would be needed, and max_epochs is {dataset.max_epochs:g}. Lower its mix_ratio, raise "
        f"max_epochs, add data, or train on at most {possible:,} tokens (--total-tokens)"
    )


def _has_columns(dataset: DatasetConfig, kind: str) -> bool:
    columns = dataset.columns
    if kind == "conversation":
        return bool(columns.messages or (columns.prompt and columns.response))
    if kind == "preference":
        pair = columns.chosen and columns.rejected
        voted = columns.prompt and len(columns.responses) == 2 and columns.preferred
        return bool(pair or voted)
    return bool(columns.prompt or columns.messages)

"""What a mixture asks of its datasets, and whether they can give it, before work starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.mixture import DatasetConfig, Kind, MixtureConfig
from equilibrium_mcore.config.mixture_rules import effective_shares, stages_of
from equilibrium_mcore.corpus.filters.build import build_filters
from equilibrium_mcore.corpus.mixtures.documents import (
    RowError,
    SkippedRowError,
    number_of,
    to_document,
)
from equilibrium_mcore.corpus.mixtures.parts import BadRowError, SourcePart
from equilibrium_mcore.corpus.mixtures.readers import is_hub, local_files, parts_of, rows_of
from equilibrium_mcore.data.repeats import same_text, same_values
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from equilibrium_mcore.files.tables import terminal_table

PROBED_ROWS = 20
MOST_PROBED_ROWS = 1000  # with --skip-bad-rows, up to the first good one
HUB_KEYS = ("source", "subset", "revision", "data_files", "splits")
CHARACTERS_PER_TOKEN = 3  # for the disk alone, and low: more tokens need more room
# Held-out documents are not of average length; so much more is taken, lest training lack it.
SURPLUS = 0.01
COMPRESSION = 4  # how much larger text is than a compressed file


@dataclass(frozen=True)
class SourcePlan:
    """One dataset's part. Counts are tokens, or examples in posttrain phases; None: no limit.

    `take` holds the part for validation too; `parts` is None while the Hub was not asked.
    """

    dataset: DatasetConfig
    share: float
    needed: float | None
    take: int | None
    hub: bool
    inputs: list[dict[str, Any]] = field(default_factory=list)
    parts: list[SourcePart] | None = None

    @property
    def input_bytes(self) -> int:
        """Bytes of the local files; 0 for the Hub."""
        return sum(entry["bytes"] for entry in self.inputs)


@dataclass(frozen=True)
class MixturePlan:
    """All datasets' parts. `notes`: what their filters say of the files that they were built of."""

    mixture: MixtureConfig
    sources: list[SourcePlan]
    total: int | None
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A table of the plan, and its arithmetic."""
        unit = "tokens" if self.mixture.kind == "text" else "examples"
        metadata, ratio = self.mixture.metadata, self.mixture.validation.ratio
        lines = [f"{self.mixture.name}: {metadata.phase}. {metadata.description}".rstrip()]
        total = "all that there is" if self.total is None else f"{self.total:,} {unit}"
        lines.append(f"trains on {total}; {ratio:.3g} of the documents are held out")
        if self.total and metadata.steps and self.mixture.kind == "text":
            per_step, length = self.total / metadata.steps, metadata.max_seq_length
            lines.append(
                f"{metadata.steps:,} steps of {per_step:,.0f} tokens: "
                f"{per_step / length:,.1f} sequences of {length:,}"
            )
        head = ("dataset", "mix_ratio", "share", unit, "to take", "estimate", "epochs", "source")
        lines.append(terminal_table(head, map(_row, self.sources), align="lrrrrrrl"))
        lines += [_sampling_line(s.dataset) for s in self.sources if _sampling_line(s.dataset)]
        lines += self.notes
        return "\n".join(lines)


def make_plan(mixture: MixtureConfig) -> MixturePlan:
    """Shares and needs; opens nothing."""
    metadata = mixture.metadata
    total = metadata.total_tokens if mixture.kind == "text" else metadata.total_examples
    sources = []
    for dataset, share in zip(mixture.datasets, effective_shares(mixture), strict=True):
        needed = None if total is None else share * total
        kept = (1 - mixture.validation.ratio) / (1 + SURPLUS)
        take = None if needed is None else -int(-needed // kept)
        sources.append(SourcePlan(dataset, share, needed, take, is_hub(dataset)))
    return MixturePlan(mixture, sources, total)


def open_sources(plan: MixturePlan, *, ask_hub: bool, skip_bad_rows: bool = False) -> MixturePlan:
    """The plan with files and parts, each source's first rows read as the work will read them.

    Raises ConfigError with every problem: tokenizer, filters, files, fields. The Hub is asked only
    when all local sources are good, since that may download.
    """
    problems: list[str] = []
    notes: list[str] = []
    tokenizer = _tokenizer(plan.mixture, problems)
    if not problems:
        problems += _filter_problems(plan.mixture.datasets, tokenizer, notes)
    opened = {source.dataset.name: source for source in plan.sources}
    for wanted in (False, True):
        for source in plan.sources:
            if source.hub != wanted or (wanted and (problems or not ask_hub)):
                continue
            try:
                opened[source.dataset.name] = _open(source, plan.mixture.kind, skip_bad_rows)
            except (OSError, ValueError, ImportError) as error:
                problems.append(str(error))
    if not plan.mixture.allow_repeated_sources:
        problems += _repeated(opened.values())
    if problems:
        raise ConfigError(dict.fromkeys(problems), source=plan.mixture.name)
    return MixturePlan(plan.mixture, list(opened.values()), plan.total, notes)


def check_disk(plan: MixturePlan, output: Path, *, bytes_per_token: int) -> str:
    """The room that the work needs, in words; raises OSError when there is less."""
    needed = 0.0
    for source in plan.sources:
        compressed = any(
            str(entry["path"]).endswith((".gz", ".zst", ".parquet")) for entry in source.inputs
        )
        text_bytes = source.input_bytes * (COMPRESSION if compressed else 1)
        if plan.mixture.kind == "text":
            here = text_bytes / CHARACTERS_PER_TOKEN
            reads_all = source.dataset.sampling.method == "weighted"
            known = source.dataset.estimated_tokens if source.hub and reads_all else None
            limits = [n for n in (None if reads_all else source.take, here or known) if n]
            needed += (min(limits) if limits else source.take or 0) * bytes_per_token
        else:
            needed += text_bytes
    needed *= 2  # the shards, and the datasets that are made of them
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{needed / 1e9:,.1f} GB of disk needed at most, {free / 1e9:,.1f} GB free in {place}"
    if needed > free:
        raise OSError(
            f"{output}: {text}. Prepare fewer tokens (--total-tokens), choose another --output, or "
            f"pass --ignore-disk if you know better"
        )
    return text


# --------------------------------------------------------------------------------- the inside


def _tokenizer(mixture: MixtureConfig, problems: list[str]) -> Tokenizer | None:
    if mixture.tokenizer is None:
        if mixture.kind == "text":
            problems.append(
                "tokenizer: missing; the phase trains on text: name one in the mixture, or with "
                "--tokenizer-type and --tokenizer-model"
            )
        return None
    try:
        return load_tokenizer(mixture.tokenizer)
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return None


def _filter_problems(
    datasets: Iterable[DatasetConfig], tokenizer: Tokenizer | None, notes: list[str]
) -> list[str]:
    """What keeps filters from being built; `notes` gets what those that were built say."""
    problems = []
    for place, dataset in enumerate(datasets):
        try:
            chain = build_filters(dataset.filters, tokenizer=tokenizer)
            notes += [f"{dataset.name}: {note}" for note in chain.notes()]
        except ConfigError as error:
            problems += [f"datasets.{place}.{text} ({dataset.name})" for text in error.problems]
    return problems


def _repeated(sources: Iterable[SourcePlan]) -> list[str]:
    """A problem for each pair of datasets that read the same, by content and not by name."""
    hub, local = {}, []
    for source in sources:
        dataset = source.dataset
        if source.hub:
            hub[dataset.name] = tuple(str(getattr(dataset, key)) for key in HUB_KEYS)
        for entry in [] if source.hub else source.inputs:
            local += [(dataset.name, file) for file in _files_in(Path(entry["path"]))]
    return [
        f"{pair} read the same data: leave one out, or say that it is meant with "
        f"allow_repeated_sources: true"
        for pair in [*same_values(hub), *same_text(local)]
    ]


def _open(source: SourcePlan, kind: Kind, skip_bad_rows: bool) -> SourcePlan:
    dataset = source.dataset
    parts = parts_of(dataset)
    _probe(dataset, kind, parts, skip_bad_rows)
    if source.hub:
        where = {key: getattr(dataset, key) for key in (*HUB_KEYS, "streaming")}
        inputs = [{**where, "path": dataset.source, "bytes": 0, "parts": len(parts)}]
    else:
        inputs = [_facts(path) for path in local_files(dataset)]
    return SourcePlan(dataset, source.share, source.needed, source.take, source.hub, inputs, parts)


def _facts(path: Path) -> dict[str, Any]:
    states = [file.stat() for file in _files_in(path)]
    return {
        "path": str(path),
        "bytes": sum(state.st_size for state in states),
        "modified_ns": max(state.st_mtime_ns for state in states),
    }


def _files_in(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _probe(
    dataset: DatasetConfig, kind: Kind, parts: list[SourcePart], skip_bad_rows: bool
) -> None:
    """Read the first rows; raises ValueError when there are none, or one is no document.

    With `skip_bad_rows` they are read up to one that is a document: settings that fit no row are
    told now all the same.
    """
    seen, first_bad, good = 0, "", False
    for place, row in (pair for part in parts for pair in rows_of(dataset, part)):
        if seen >= (PROBED_ROWS if good or not skip_bad_rows else MOST_PROBED_ROWS):
            break
        seen += 1
        problem = _problem_of(dataset, kind, row)
        good = good or not problem
        first_bad = first_bad or (f"{place}: {problem}" if problem else "")
        if problem and not skip_bad_rows:
            raise ValueError(
                f"{dataset.name}: {first_bad}, or leave such rows out with --skip-bad-rows"
            )
    if not seen:
        raise ValueError(f"{dataset.name}: source {dataset.source} is empty: it has no row to read")
    if not good:
        raise ValueError(
            f"{dataset.name}: none of the first {seen:,} rows is a document, the first: {first_bad}"
        )


def _problem_of(dataset: DatasetConfig, kind: Kind, row: Any) -> str:
    """What keeps a row from being a document, and what to do; empty for one that is."""
    if isinstance(row, BadRowError):
        return f"{row}. Repair the row"
    try:
        to_document(kind, dataset, row)
        if dataset.sampling.method != "uniform":
            number_of(row, str(dataset.sampling.field))
    except SkippedRowError:
        pass
    except RowError as error:
        return (
            f"{error}. Correct text_field, text_template, columns or sampling.field of the dataset"
        )
    return ""


def _row(source: SourcePlan) -> tuple[str, ...]:
    dataset, held = source.dataset, source.dataset.estimated_tokens
    epochs = f"{source.needed / held:.2f}" if held and source.needed else "?"
    where = dataset.source + (f" ({dataset.subset})" if dataset.subset else "")
    size = f", {source.input_bytes / 1e6:,.1f} MB" if source.inputs and not source.hub else ""
    return (
        dataset.name,
        f"{dataset.mix_ratio:.4f}",
        f"{source.share:.4f}",
        "all" if source.needed is None else f"{source.needed:,.0f}",
        "all" if source.take is None else f"{source.take:,}",
        f"{held:,}" if held else "?",
        epochs,
        f"{where}{', Hub' if source.hub else ''}{size}",
    )


def _sampling_line(dataset: DatasetConfig) -> str:
    sampling = dataset.sampling
    if sampling.method == "weighted":
        return f"{dataset.name}: all is read, then documents are drawn by {sampling.field!r}"
    if sampling.method == "curriculum":
        order = "falling" if sampling.hardest_first else "rising"
        return f"{dataset.name}: {stages_of(dataset)} stages by {order} {sampling.field!r}"
    return ""

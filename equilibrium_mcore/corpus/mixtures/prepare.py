"""A mixture to indexed datasets, a blend and a manifest: in parallel, and resumable.

    OUTPUT/manifest.json                    what was made of what; written last
    OUTPUT/mixture.yaml                     the effective settings
    OUTPUT/blend.yaml                       what a run names as `data:`; one per curriculum stage
    OUTPUT/conversations.yaml               the same for the phase posttrain_sft
    OUTPUT/preferences.yaml                 the same for the phase posttrain_dpo
    OUTPUT/prompts.yaml                     the same for the phase posttrain_grpo
    OUTPUT/data/NAME_text_document.*        an indexed dataset; its last documents are held out
    OUTPUT/data/NAME.{train,validation}.jsonl   posttrain phases instead
    OUTPUT/.work/                           shards; a killed run resumes from them

Three steps: workers make shards of all that is read; one process goes over them in order and
decides; the datasets are written. Nothing has its final name before all of them are whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.config.mixture_rules import epoch_problem
from equilibrium_mcore.config.yaml_io import to_yaml
from equilibrium_mcore.corpus.encode import EncoderPlan, plan_encoder
from equilibrium_mcore.corpus.filters.build import build_filters
from equilibrium_mcore.corpus.mixtures.manifest import (
    NAME,
    MixtureManifest,
    SourceFacts,
    read_mixture_manifest,
    versions,
)
from equilibrium_mcore.corpus.mixtures.merge import Chosen, SharedIndexes, choose
from equilibrium_mcore.corpus.mixtures.parts import SourcePart
from equilibrium_mcore.corpus.mixtures.plan import (
    MixturePlan,
    SourcePlan,
    check_disk,
    make_plan,
    open_sources,
)
from equilibrium_mcore.corpus.mixtures.shards import (
    FORMAT_VERSION,
    SHARD_CHARACTERS,
    SHARD_ROWS,
    WorkSpec,
)
from equilibrium_mcore.corpus.mixtures.workers import ShardWorkers
from equilibrium_mcore.corpus.mixtures.write import (
    DATA_FILES,
    OutputSet,
    blend_texts,
    conversation_texts,
)
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.files.exclusive import exclusive
from equilibrium_mcore.files.replace import refuse_sources
from equilibrium_mcore.files.whole import write_whole

# Settings of a dataset that do not change its shards: with other values the work is used again.
NOT_IN_SHARDS = {"mix_ratio", "estimated_tokens", "max_epochs"}
NOT_IN_SAMPLING = {"temperature", "stages", "boundaries", "hardest_first"}


@dataclass(frozen=True)
class Options:
    """How to prepare; none of it changes the result but `sample_rows` and `skip_bad_rows`.

    sample_rows: a trial with about so many rows of each dataset, without a budget.
    """

    output: Path
    workers: int = 1
    sample_rows: int | None = None
    skip_bad_rows: bool = False
    overwrite: bool = False
    keep_work: bool = False
    ignore_disk: bool = False
    shard_characters: int = SHARD_CHARACTERS


def prepare(
    mixture: MixtureConfig, options: Options, *, say: Callable[[str], None] = lambda text: None
) -> MixtureManifest:
    """Prepare a mixture; returns its manifest.

    Raises ConfigError, OSError and ValueError before any work for what is wrong with the mixture,
    its sources or the disk; BadRowError for a row that is no document; ConfigError with the
    arithmetic when a dataset would be repeated more often than its max_epochs. After any error, and
    after a kill, the same call resumes from the shards that are whole.
    """
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: at least 1 is needed")
    with ShardWorkers(options.workers) as workers:
        plan = open_sources(make_plan(mixture), ask_hub=True, skip_bad_rows=options.skip_bad_rows)
        say(plan.text())
        encoder = plan_encoder(mixture.tokenizer) if mixture.kind == "text" else None
        request = _fingerprint(
            mixture.model_dump(mode="json"),
            _inputs(plan),
            options.sample_rows,
            options.skip_bad_rows,
            _ids_of(encoder),
        )
        read = [Path(str(entry["path"])) for source in plan.sources for entry in source.inputs]
        refuse_sources(_final_places(options.output), read, option="--output")
        done = _already_there(options, request)
        if done is not None:
            say(f"{options.output} holds exactly this already")
            return done
        if not options.ignore_disk:
            width = encoder.dtype.itemsize if encoder else 1
            say(check_disk(plan, options.output, bytes_per_token=width))
        work = options.output / ".work"
        with _locked(work):
            _check_final_names(options, work, request)
            chosen = _choose_all(plan, options, encoder, workers, work)
            if options.sample_rows is None:
                _check_epochs(plan, chosen)
            manifest = _write_all(plan, chosen, options, encoder, request, say)
        if not options.keep_work:
            shutil.rmtree(work, ignore_errors=True)
    return manifest


# ------------------------------------------------------------------------------------ the steps


def _choose_all(
    plan: MixturePlan,
    options: Options,
    encoder: EncoderPlan | None,
    workers: ShardWorkers,
    work: Path,
) -> list[Chosen]:
    indexes, chosen = SharedIndexes(), []
    mixture = plan.mixture
    tokenizer = load_tokenizer(mixture.tokenizer) if mixture.tokenizer else None
    for source in plan.sources:
        spec = _work_spec(source, mixture, options, encoder, work)
        chain = build_filters(source.dataset.filters, tokenizer=tokenizer)
        parts = _in_seeded_order(source, mixture.validation.seed)
        target = None if options.sample_rows else source.take
        with (
            contextlib.closing(workers.shards(spec, parts)) as shards,
            _progress_bar(source.dataset.name, target, mixture.kind) as bar,
        ):
            found = choose(
                spec,
                shards,
                indexes.of(source.dataset, chain),
                target=target,
                max_rows=options.sample_rows,
                progress=bar.update,
            )
        if not found.documents:
            reasons = ", ".join(f"{reason} ({n:,})" for reason, n in found.dropped.most_common(5))
            raise ValueError(
                f"{source.dataset.name}: none of {found.counts['rows']:,} rows stays: "
                f"{found.counts['empty']:,} empty, {found.counts['bad']:,} bad, dropped: "
                f"{reasons or 'none'}. Change its filters, or take it out of the mixture"
            )
        chosen.append(found)
    return chosen


def _check_epochs(plan: MixturePlan, chosen: list[Chosen]) -> None:
    if plan.total is None or plan.mixture.kind != "text":
        return
    problems = []
    for source, found in zip(plan.sources, chosen, strict=True):
        problems.append(
            epoch_problem(
                source.dataset,
                share=source.share,
                total_tokens=plan.total,
                held_tokens=found.tokens,
                ratio=plan.mixture.validation.ratio,
            )
        )
    if any(problems):
        raise ConfigError(filter(None, problems), source=plan.mixture.name)


def _write_all(
    plan: MixturePlan,
    chosen: list[Chosen],
    options: Options,
    encoder: EncoderPlan | None,
    request: str,
    say: Callable[[str], None],
) -> MixtureManifest:
    mixture, facts = plan.mixture, []
    ratio = mixture.validation.ratio
    split = f"{1 - ratio!r},{ratio!r},0"
    with OutputSet(options.output, encoder) as outputs:
        for source, found in zip(plan.sources, chosen, strict=True):
            written = outputs.write(found, split, source.inputs)
            train = sum(output.train_tokens for output in written)
            facts.append(
                SourceFacts(
                    name=source.dataset.name,
                    source=source.dataset.source,
                    mix_ratio=source.dataset.mix_ratio,
                    share=source.share,
                    needed_tokens=source.needed,
                    rows=found.counts["rows"],
                    characters_in=found.counts["characters_in"],
                    empty=found.counts["empty"],
                    bad=found.counts["bad"],
                    first_bad=found.first_bad,
                    dropped=dict(sorted(found.dropped.items())),
                    not_needed=found.counts["not_needed"],
                    documents=found.documents,
                    tokens=found.tokens,
                    train_tokens=train,
                    validation_tokens=sum(output.validation_tokens for output in written),
                    epochs=source.needed / train if source.needed and train else None,
                    max_epochs=source.dataset.max_epochs,
                    inputs=source.inputs,
                    outputs=written,
                )
            )
        blends = (
            blend_texts(plan, facts, options.output, split)
            if encoder
            else conversation_texts(plan, facts, options.output)
        )
        manifest = MixtureManifest(
            name=mixture.name,
            phase=mixture.metadata.phase,
            kind=mixture.kind,
            mixture=mixture.model_dump(mode="json"),
            request=request,
            tokenizer=_tokenizer_facts(encoder),
            sample_rows=options.sample_rows,
            split=split,
            blends=list(blends),
            datasets=facts,
            versions=versions(),
        )
        write_whole(options.output / ".work" / "publishing", request)
        (options.output / NAME).unlink(missing_ok=True)
        outputs.publish()
    for name, text in blends.items():
        write_whole(options.output / name, text)
    write_whole(options.output / "mixture.yaml", to_yaml(mixture.model_dump(mode="json")))
    manifest.write(options.output)
    say(f"{options.output / NAME} written")
    return manifest


# ------------------------------------------------------------------------------------ the inside


def _work_spec(
    source: SourcePlan,
    mixture: MixtureConfig,
    options: Options,
    encoder: EncoderPlan | None,
    work: Path,
) -> WorkSpec:
    values = source.dataset.model_dump(mode="json", exclude=NOT_IN_SHARDS)
    values["sampling"] = {k: v for k, v in values["sampling"].items() if k not in NOT_IN_SAMPLING}
    rows = min(options.sample_rows or SHARD_ROWS, SHARD_ROWS)
    tokenizer = _ids_of(encoder)
    sizes = (rows, options.shard_characters, options.skip_bad_rows, FORMAT_VERSION)
    state = _fingerprint(
        values, source.inputs, mixture.kind, mixture.validation.seed, tokenizer, sizes
    )
    folder = work / f"{source.dataset.name}-{state[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return WorkSpec(
        dataset=source.dataset,
        kind=mixture.kind,
        encoder=encoder,
        seed=mixture.validation.seed,
        folder=folder,
        skip_bad_rows=options.skip_bad_rows,
        shard_rows=rows,
        shard_characters=options.shard_characters,
    )


def _in_seeded_order(source: SourcePlan, seed: int) -> list[tuple[int, SourcePart]]:
    """(number, part) in the order of reading: what comes first is a random part of the source."""
    parts = list(enumerate(source.parts or []))
    name = int.from_bytes(hashlib.sha256(source.dataset.name.encode()).digest()[:8], "little")
    order = np.random.default_rng([seed, name]).permutation(len(parts))
    return [parts[place] for place in order]


def _fingerprint(*values: object) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _ids_of(encoder: EncoderPlan | None) -> tuple[str, int] | None:
    """What decides the ids of a text: the tokenizer, and the token that ends a document.

    The latter may be named in a file beside the tokenizer, which its hash does not see.
    """
    return None if encoder is None else (encoder.fingerprint, encoder.eod)


def _inputs(plan: MixturePlan) -> list:
    return [source.inputs for source in plan.sources]


def _tokenizer_facts(encoder: EncoderPlan | None) -> dict | None:
    if encoder is None:
        return None
    return {
        "type": encoder.kind,
        "model": str(encoder.path),
        "sha256": encoder.fingerprint,
        "vocab_size": encoder.vocab_size,
        "eod": encoder.eod,
        "bytes_per_token": encoder.dtype.itemsize,
    }


def _already_there(options: Options, request: str) -> MixtureManifest | None:
    """The manifest of the same request; raises FileExistsError for that of another."""
    if not (options.output / NAME).is_file():
        return None
    # Of another tool, it raises: not even --overwrite replaces what this one did not write.
    manifest = read_mixture_manifest(options.output)
    if options.overwrite:
        return None
    if manifest.request == request:
        return manifest
    raise FileExistsError(
        f"{options.output / NAME} is that of another mixture, of other inputs or settings "
        f"({manifest.name}): pass --overwrite to replace it, or choose another --output"
    )


def _check_final_names(options: Options, work: Path, request: str) -> None:
    """Final names may be taken only where this tool wrote: by a publication that was cut short.

    That of another request is replaced with --overwrite alone.
    """
    marker = work / "publishing"
    cut_short = marker.is_file() and (options.overwrite or marker.read_text() == request)
    if cut_short or (options.output / NAME).exists():
        return
    data, *others = _final_places(options.output)
    there = sorted(data.glob("*")) + [path for path in others if path.exists()]
    taken = [str(path) for path in there if not path.name.endswith((".partial", ".lengths"))]
    if taken:
        raise FileExistsError(
            f"{', '.join(taken[:4])} exists already and no manifest says what it is, so not even "
            f"--overwrite replaces it; choose another --output, or move it away"
        )


def _final_places(output: Path) -> list[Path]:
    """The folder of the datasets, and the files beside it."""
    files = (NAME, "mixture.yaml", "blend.yaml", *(file for file, _ in DATA_FILES.values()))
    return [output / "data", *(output / name for name in files)]


def _locked(work: Path) -> contextlib.AbstractContextManager[None]:
    """One run at a time in a folder; raises FileExistsError for the second."""
    held = FileExistsError(
        f"{work}: another run prepares this folder; wait for it, or choose another --output"
    )
    return exclusive(work / "lock", held=held)


def _progress_bar(name: str, target: int | None, kind: str):
    """A bar on a terminal; nothing in a log file."""
    from tqdm import tqdm

    unit = " tokens" if kind == "text" else " examples"
    return tqdm(total=target, unit=unit, unit_scale=True, desc=name, disable=None)

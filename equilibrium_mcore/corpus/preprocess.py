"""JSONL in, Megatron's .bin/.idx out: ordered, in a stream, on several processes.

`inputs.py` cuts the inputs into ranges of whole lines, `workers.py` makes token ids of them, and
here they are written in order and forgotten: memory does not grow with the input. Every
`JOURNAL_SECONDS` the temporary files go to disk and the journal says how far they are whole: a run
that was killed resumes from there. A run that finds its own finished datasets has nothing to do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.encode import EncoderChoice, plan_encoder
from equilibrium_mcore.corpus.finished import Request, find_finished, refusal
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter, complete_publication
from equilibrium_mcore.corpus.journal import Journal, describe_run
from equilibrium_mcore.corpus.preprocess_run import PreprocessRun, stop_signals
from equilibrium_mcore.corpus.workers import EncodingTask, Workers
from equilibrium_mcore.data.indexed_files import Manifest, dataset_paths
from equilibrium_mcore.data.inputs import RANGE_BYTES, list_inputs, partition_windows
from equilibrium_mcore.files.replace import refuse_sources
from equilibrium_mcore.processes.threads import available_cores

JOURNAL_SECONDS = 20.0


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written, for each key; bytes are those of the inputs on disk.

    `found`: it was there already, made of the same, and nothing was written.
    """

    prefixes: dict[str, Path]
    documents: int
    tokens: dict[str, int]
    bytes_read: int
    skipped_lines: int
    seconds: float
    found: bool = False

    def text(self) -> str:
        """What a tool prints."""
        lines = [
            f"{prefix}: {self.documents:,} documents, {self.tokens[key]:,} tokens"
            for key, prefix in self.prefixes.items()
        ]
        rate = "" if self.found else f", {self.bytes_read / 1e6 / self.seconds:.1f} MB/s"
        lines.append(f"{self.seconds:.1f} s{rate}, {self.skipped_lines:,} bad lines left out")
        return "\n".join(lines)


def preprocess(
    *,
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: TokenizerConfig,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int | None = None,
    encoder: EncoderChoice = "auto",
    skip_bad_lines: bool = False,
    allow_repeats: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    partition: int = 1,
    partitions: int = 1,
    range_bytes: int = RANGE_BYTES,
    journal_seconds: float = JOURNAL_SECONDS,
) -> PreprocessSummary:
    """Write `<output_prefix>_<key>_document.{bin,idx,json}` for each key.

    Args:
        workers: processes; None takes the cores that this process may use.
        allow_repeats: a file may be given more than once; else that is refused as a mistake.
        restart: forget what a stopped run left, instead of resuming from it.
        partition, partitions: write only the lines of part K of N, counted from 1.

    If the datasets are there already, made of the same by the same settings, that is all. Raises
    FileNotFoundError, FileExistsError, BadLinesError (unless `skip_bad_lines`), ChildProcessError
    for a worker that died, and ValueError (no document, no such tokenizer, an input that is
    damaged, a journal of another run). On any of them no final name is taken.
    """
    started = time.perf_counter()
    workers = available_cores() if workers is None else workers
    _check_arguments(json_keys, workers, partition, partitions)
    items = list_inputs(inputs, allow_repeats=allow_repeats)
    prefixes = output_prefixes(output_prefix, json_keys)
    written = [path for prefix in prefixes.values() for path in dataset_paths(prefix)]
    refuse_sources(written, [*inputs, tokenizer.model], option="--output-prefix")
    with ExitStack() as stack:
        # First of all: workers are forked, and later there are locked files and threads.
        pool = stack.enter_context(Workers(workers))
        plan = plan_encoder(tokenizer, choice=encoder)
        request = Request(
            inputs=items,
            tokenizer_sha256=plan.fingerprint,
            eod=plan.eod,
            append_eod=append_eod,
            partition=f"{partition} of {partitions}" if partitions > 1 else None,
            skip_bad_lines=skip_bad_lines,
        )
        journal = _journal_of(request, prefixes)
        found = _find(request, prefixes, journal, overwrite=overwrite, restart=restart)
        if found:
            return summary_of(prefixes, found, time.perf_counter() - started, found=True)
        writers = {
            key: stack.enter_context(IndexedWriter(prefix, plan.dtype.type, overwrite=overwrite))
            for key, prefix in prefixes.items()
        }
        windows = partition_windows(items, partition=partition, partitions=partitions)
        run = PreprocessRun(items, windows, writers, journal, skip_bad_lines, journal_seconds)
        stack.push(run.leave)
        run.resume(restart)
        with stop_signals() as told_to_stop:
            job = EncodingTask(plan, tuple(json_keys), append_eod)
            run.write_all(pool, job, range_bytes=range_bytes, told_to_stop=told_to_stop)
        run.publish(plan, request)
    return PreprocessSummary(
        prefixes=prefixes,
        documents=next(iter(writers.values())).documents,
        tokens={key: writer.tokens for key, writer in writers.items()},
        bytes_read=sum(end - start for start, end in windows),
        skipped_lines=run.bad.count,
        seconds=time.perf_counter() - started,
    )


def output_prefixes(output_prefix: Path, keys: Sequence[str]) -> dict[str, Path]:
    """The dataset of each key; Megatron-LM's names."""
    return {key: Path(f"{output_prefix}_{key}_document") for key in keys}


def summary_of(
    prefixes: dict[str, Path],
    manifests: dict[str, Manifest],
    seconds: float,
    *,
    found: bool = False,
) -> PreprocessSummary:
    """The summary of whole datasets, from their manifests."""
    first = next(iter(manifests.values()))
    if found:
        names = ", ".join(map(str, prefixes.values()))
        print(f"{names}: there already, made of the same: nothing to do", file=sys.stderr)
    return PreprocessSummary(
        prefixes=prefixes,
        documents=first.documents,
        tokens={key: manifest.tokens for key, manifest in manifests.items()},
        bytes_read=sum(entry["bytes"] for entry in first.inputs),
        skipped_lines=first.skipped_lines,
        seconds=seconds,
        found=found,
    )


def _journal_of(request: Request, prefixes: dict[str, Path]) -> Journal:
    facts = describe_run(
        request.inputs,
        tokenizer={"sha256": request.tokenizer_sha256, "end of document": request.eod},
        options={
            "--json-keys": list(prefixes),
            "--append-eod": request.append_eod,
            "partition": request.partition or "1 of 1",
        },
    )
    return Journal(Path(f"{next(iter(prefixes.values()))}.journal.partial"), facts)


def _find(
    request: Request,
    prefixes: dict[str, Path],
    journal: Journal,
    *,
    overwrite: bool,
    restart: bool,
) -> dict[str, Manifest]:
    """The finished datasets of the request, or none; raises FileExistsError for some of them."""
    completed = not restart and _complete(journal, prefixes)
    if overwrite and not completed:
        return {}
    found = find_finished(prefixes, request)
    if 0 < len(found) < len(prefixes):
        others = ", ".join(repr(key) for key in prefixes if key not in found)
        raise refusal([str(prefixes[key]) for key in found], f"{others} is missing beside it")
    return found


def _complete(journal: Journal, prefixes: dict[str, Path]) -> bool:
    """Give datasets their names that a killed run had written whole; whether there were any."""
    left = journal.read()
    if left is None or not left.whole:
        return False
    for prefix in prefixes.values():
        complete_publication(prefix)
    journal.remove()
    return True


def _check_arguments(keys: Sequence[str], workers: int, partition: int, partitions: int) -> None:
    double = sorted({key for key in keys if list(keys).count(key) > 1})
    if double:
        raise ValueError(f"--json-keys names {', '.join(double)} more than once")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    if not 1 <= partition <= partitions:
        raise ValueError(f"--partition {partition}: partitions count from 1 to {partitions}")

"""One dataset made in parts, by several processes here or by several hosts, then merged.

Each part is a dataset of its own beside the final one, `..._part-K-of-N`. A part that is there and
was made of the same is not made again; so the hosts of a cluster each write one, and a last run
without `partition` makes what is missing and merges. Where all is merged already, it only removes
the parts that a kill left.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from equilibrium_mcore.corpus.finished import Request, differences_from, find_finished
from equilibrium_mcore.corpus.indexed_writer import (
    complete_publication,
    publication_cut_short,
    refuse_existing_dataset,
)
from equilibrium_mcore.corpus.merge import merge_datasets
from equilibrium_mcore.corpus.preprocess import (
    PreprocessSummary,
    output_prefixes,
    preprocess,
    summary_of,
)
from equilibrium_mcore.data.indexed_files import Manifest, dataset_paths, read_manifest
from equilibrium_mcore.data.inputs import list_inputs
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.processes.parents import end_with_parent
from equilibrium_mcore.processes.threads import available_cores


def preprocess_in_partitions(
    *, partitions: int = 1, partition: int | None = None, **settings: Any
) -> PreprocessSummary:
    """`preprocess`, in `partitions` parts; the result's bytes are the same for any number.

    Args:
        partition: make only this part (1 to `partitions`), and do not merge.
        settings: of `preprocess`; `workers` are shared out among the parts.

    Raises what `preprocess` and `merge_datasets` raise.
    """
    if partitions < 1:
        raise ValueError(f"--partitions {partitions}: at least 1 is needed")
    if partitions == 1 and partition in (None, 1):
        return preprocess(**settings)
    output = settings.pop("output_prefix")
    keys = settings.setdefault("json_keys", ("text",))
    if partition is not None:
        return preprocess(
            output_prefix=_part(output, partition, partitions),
            partition=partition,
            partitions=partitions,
            **settings,
        )
    started = time.perf_counter()
    overwrite = settings.get("overwrite", False)
    prefixes = output_prefixes(output, keys)
    request = _request(settings)
    if overwrite:  # before hours of work, and not after
        for prefix in prefixes.values():
            refuse_existing_dataset(prefix, overwrite=True)
    found = {} if overwrite else _find_merged(prefixes, request)
    if len(found) == len(prefixes):
        _remove_parts(output, partitions, request, keys)
        return summary_of(prefixes, found, time.perf_counter() - started, found=True)
    missing = [
        number
        for number in range(1, partitions + 1)
        if not _is_made(output, number, partitions, request, keys, overwrite=overwrite)
    ]
    _make(missing, output, partitions, settings)
    for key, prefix in prefixes.items():
        parts = [
            output_prefixes(_part(output, number, partitions), keys)[key]
            for number in range(1, partitions + 1)
        ]
        # Two shares of a monotonous input may hold the same.
        merge_datasets(
            prefixes=parts, output_prefix=prefix, overwrite=overwrite, allow_repeats=True
        )
    _remove_parts(output, partitions, request, keys)
    manifests = {key: read_manifest(prefix) for key, prefix in prefixes.items()}
    return summary_of(prefixes, manifests, time.perf_counter() - started)


def _request(settings: dict[str, Any]) -> Request:
    tokenizer = load_tokenizer(settings["tokenizer"])
    return Request(
        inputs=list_inputs(settings["inputs"], allow_repeats=settings.get("allow_repeats", False)),
        tokenizer_sha256=tokenizer.fingerprint,
        eod=tokenizer.eod,
        append_eod=settings.get("append_eod", False),
        partition=None,
        skip_bad_lines=settings.get("skip_bad_lines", False),
    )


def _find_merged(prefixes: dict[str, Path], request: Request) -> dict[str, Manifest]:
    """What was merged already; before hours of work, and not after, anything else is refused."""
    for prefix in prefixes.values():
        if publication_cut_short(prefix):
            complete_publication(prefix)
    return find_finished(prefixes, request)


def _remove_parts(output: Path, partitions: int, request: Request, keys: Sequence[str]) -> None:
    """Parts of this run; the .idx goes first, so that no half part looks whole."""
    for number in range(1, partitions + 1):
        wanted = _of_part(request, number, partitions)
        for prefix in output_prefixes(_part(output, number, partitions), keys).values():
            binary, index, description = dataset_paths(prefix)
            if description.exists() and _differences(prefix, wanted):
                continue
            for path in (index, binary, description):
                path.unlink(missing_ok=True)


def _part(output_prefix: Path, partition: int, partitions: int) -> Path:
    return Path(f"{output_prefix}_part-{partition}-of-{partitions}")


def _of_part(request: Request, number: int, partitions: int) -> Request:
    return replace(request, partition=f"{number} of {partitions}")


def _is_made(
    output: Path,
    number: int,
    partitions: int,
    request: Request,
    keys: Sequence[str],
    *,
    overwrite: bool,
) -> bool:
    """Whether a part is there. Raises ValueError if it is there and made of something else."""
    wanted = _of_part(request, number, partitions)
    for prefix in output_prefixes(_part(output, number, partitions), keys).values():
        if not dataset_paths(prefix)[1].exists():
            return False
        differences = _differences(prefix, wanted)
        if differences and not overwrite:
            raise ValueError(
                f"{prefix} is a part of another run: {'; '.join(differences[:4])}. Remove it, or "
                f"pass --overwrite to make it again"
            )
        if differences:
            return False
    return True


def _differences(prefix: Path, wanted: Request) -> list[str]:
    manifest = read_manifest(prefix)
    if manifest is None:
        return ["no manifest says what it is"]
    return differences_from(prefix, manifest, wanted)


def _make(missing: Sequence[int], output: Path, partitions: int, settings: dict[str, Any]) -> None:
    """Make parts, at most as many at a time as there are workers, each with its share of them."""
    workers = settings.get("workers") or available_cores()
    at_a_time = max(1, min(workers, len(missing)))
    context = multiprocessing.get_context("spawn")  # each part forks workers of its own
    share = {**settings, "workers": max(1, workers // at_a_time)}
    waiting = list(missing)
    running: list[Any] = []
    failed: list[int] = []
    before = signal.signal(signal.SIGTERM, _leave)  # parts write their journals when asked to stop
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                number = waiting.pop(0)
                part = _part(output, number, partitions)
                arguments = (part, number, partitions, os.getpid(), share)
                running.append(context.Process(target=_make_part, args=arguments, name=f"{number}"))
                running[-1].start()
            multiprocessing.connection.wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                process.join()
                if process.exitcode:
                    failed.append(int(process.name))
                    _say_what_killed(process)
                    waiting.clear()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
        signal.signal(signal.SIGTERM, before)
    if failed:
        raise ValueError(
            f"partition {', '.join(map(str, sorted(failed)))} of {partitions} failed (above). The "
            f"finished parts are kept: the same command makes the rest"
        )


def _say_what_killed(process: multiprocessing.process.BaseProcess) -> None:
    """A part that failed has said why; one that was killed cannot."""
    if process.exitcode is not None and process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        print(
            f"partition {process.name}: killed by {name}, most often because memory ran out: take "
            f"fewer --workers",
            file=sys.stderr,
        )


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _make_part(
    part: Path, number: int, partitions: int, parent: int, settings: dict[str, Any]
) -> None:
    end_with_parent(parent)
    try:
        preprocess(output_prefix=part, partition=number, partitions=partitions, **settings)
    except (ValueError, OSError) as error:
        print(f"partition {number} of {partitions}: {error}", file=sys.stderr)
        raise SystemExit(1) from None

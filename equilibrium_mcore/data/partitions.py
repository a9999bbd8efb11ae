"""One dataset made in parts, by several processes here or by several hosts, then merged.

Each part is a dataset of its own beside the final one, `..._part-K-of-N`. A part that is there and
was made of the same is not made again; so the hosts of a cluster each write one, and a last run
without `partition` makes what is missing and merges.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equilibrium_mcore.data.indexed_files import (
    dataset_paths,
    read_manifest,
    refuse_existing_dataset,
)
from equilibrium_mcore.data.inputs import list_inputs
from equilibrium_mcore.data.merge import merge_datasets
from equilibrium_mcore.data.preprocess import (
    PreprocessSummary,
    output_prefixes,
    preprocess,
)
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
    _refuse_existing(output, keys, overwrite)
    inputs = [[str(item.path), item.size] for item in list_inputs(settings["inputs"])]
    fingerprint = load_tokenizer(settings["tokenizer"]).fingerprint
    missing = [
        number
        for number in range(1, partitions + 1)
        if not _is_made(_part(output, number, partitions), inputs, fingerprint, settings)
    ]
    _make(missing, output, partitions, settings)
    prefixes = output_prefixes(output, keys)
    for key, prefix in prefixes.items():
        parts = [
            output_prefixes(_part(output, number, partitions), keys)[key]
            for number in range(1, partitions + 1)
        ]
        merge_datasets(prefixes=parts, output_prefix=prefix, overwrite=overwrite)
    for number in range(1, partitions + 1):
        for prefix in output_prefixes(_part(output, number, partitions), keys).values():
            for path in dataset_paths(prefix):
                path.unlink(missing_ok=True)
    return _summary(prefixes, time.perf_counter() - started)


def _part(output_prefix: Path, partition: int, partitions: int) -> Path:
    return Path(f"{output_prefix}_part-{partition}-of-{partitions}")


def _refuse_existing(output: Path, keys: Sequence[str], overwrite: bool) -> None:
    """Before hours of work, not behind them."""
    for prefix in output_prefixes(output, keys).values():
        refuse_existing_dataset(prefix, overwrite=overwrite)


def _is_made(part: Path, inputs: list, fingerprint: str, settings: dict[str, Any]) -> bool:
    """Whether a part is there. Raises ValueError if it is there and made of something else."""
    for prefix in output_prefixes(part, settings["json_keys"]).values():
        if not dataset_paths(prefix)[1].exists():
            return False
        manifest = read_manifest(prefix)
        same = manifest is not None and (
            manifest.tokenizer_sha256 == fingerprint
            and manifest.append_eod == settings.get("append_eod", False)
            and [[entry["path"], entry["bytes"]] for entry in manifest.inputs] == inputs
        )
        if not same and not settings.get("overwrite", False):
            raise ValueError(
                f"{prefix} is a part of another run: its inputs, tokenizer or --append-eod "
                f"differ. Remove it, or pass --overwrite to make it anew"
            )
        if not same:
            return False
    return True


def _make(missing: Sequence[int], output: Path, partitions: int, settings: dict[str, Any]) -> None:
    """Make parts, at most as many at a time as there are workers, each with its share of them."""
    workers = settings.get("workers") or available_cores()
    at_a_time = max(1, min(workers, len(missing)))
    context = multiprocessing.get_context("spawn")  # each part forks workers of its own
    share = {**settings, "workers": max(1, workers // at_a_time)}
    waiting = list(missing)
    running: list[Any] = []
    failed: list[int] = []
    before = signal.signal(signal.SIGTERM, _leave)  # parts write their journals when told to stop
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
            f"finished parts are kept: the same command goes on"
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


def _summary(prefixes: dict[str, Path], seconds: float) -> PreprocessSummary:
    manifests = {key: read_manifest(prefix) for key, prefix in prefixes.items()}
    first = next(iter(manifests.values()))
    return PreprocessSummary(
        prefixes=prefixes,
        documents=first.documents,
        tokens={key: manifest.tokens for key, manifest in manifests.items()},
        bytes_read=sum(entry["bytes"] for entry in first.inputs),
        skipped_lines=first.skipped_lines,
        seconds=seconds,
    )

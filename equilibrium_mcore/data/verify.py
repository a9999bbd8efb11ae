"""Datasets compared with the hashes in their manifests: a sample on opening, all by a tool."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.data.block_hashes import (
    Block,
    BlockHashes,
    FileBlocks,
    blocks_of,
    sample_blocks,
)
from equilibrium_mcore.data.indexed_files import (
    IndexHeader,
    dataset_paths,
    fingerprint,
    read_header,
    read_manifest,
)
from equilibrium_mcore.files.errors import FileContentError
from equilibrium_mcore.processes.threads import available_cores

MOST_THREADS = 8  # they share one disk
PROBLEMS_SHOWN = 20  # of one dataset


def hashed_files(prefix: Path, header: IndexHeader, hashes: BlockHashes) -> list[FileBlocks]:
    """The blocks of a dataset, after a look at a few kilobytes from all over it.

    Raises ValueError where sizes or those bytes are not those that were written.
    """
    binary, index, description = dataset_paths(prefix)
    files = blocks_of(hashes, binary, index)
    found = fingerprint(prefix, header)
    if found != hashes.fingerprint:
        raise FileContentError(
            f"{binary} and {index.name} are not what {description.name} describes (fingerprint "
            f"{found}, the manifest has {hashes.fingerprint}): one of them was replaced or is "
            f"damaged. `{command('preprocess')} --verify {prefix}` names the place; copy the "
            f"dataset again, or make it again"
        )
    return files


def check_sample(files: dict[str, list[FileBlocks]], *, seed: str) -> list[str]:
    """What is wrong with some blocks of these sources, by name; the same work for any size."""
    owner = {file.path: name for name, those in files.items() for file in those}
    problems = []
    for block in sample_blocks([file for those in files.values() for file in those], seed=seed):
        try:
            block.check()
        except (ValueError, OSError) as error:
            problems.append(f"data source {owner[block.path]!r}: {error}")
    return problems


def verify_datasets(prefixes: Sequence[Path], *, out: Callable[[str], object] = print) -> bool:
    """Compare every block of these datasets; a line of `out` for each, and for each damage.

    A prefix may be given as the name of its .bin, which is what a shell's wildcard finds. Returns
    whether all of them are whole. One without hashes is not: nobody can know.
    """
    whole = True
    for prefix in (Path(str(given).removesuffix(".bin")) for given in prefixes):
        started = time.perf_counter()
        try:
            problems, count, size = _verify(prefix)
        except (ValueError, OSError) as error:
            problems, count, size = [str(error)], 0, 0
        for problem in problems[:PROBLEMS_SHOWN]:
            out(f"error: {problem}")
        if len(problems) > PROBLEMS_SHOWN:
            out(f"error: {prefix}: {len(problems) - PROBLEMS_SHOWN:,} more damaged blocks")
        if not problems:
            seconds = time.perf_counter() - started
            out(f"{prefix}: whole ({count:,} blocks, {size / 1e6:,.1f} MB, {seconds:.1f} s)")
        whole = whole and not problems
    return whole


def _verify(prefix: Path) -> tuple[list[str], int, int]:
    """Problems, and how many blocks and bytes were compared."""
    read_header(prefix, may_be_empty=True)
    manifest = read_manifest(prefix)
    if manifest is None or manifest.hashes is None:
        why = "no manifest" if manifest is None else "a manifest without hashes"
        raise FileContentError(
            f"{prefix} has {why}: it was made by Megatron-LM, or by a version before there were "
            f"any, and cannot be verified. Make it again, or (where there is a manifest) copy it "
            f"by `{command('merge')} --input {prefix} --output-prefix OTHER`, which writes them"
        )
    files = blocks_of(manifest.hashes, *dataset_paths(prefix)[:2])
    blocks = [block for file in files for block in file]
    size = sum(block.end - block.start for block in blocks)
    threads = min(MOST_THREADS, available_cores())
    with ThreadPoolExecutor(threads) as pool, _progress_bar(str(prefix), size) as advance:
        results = []
        for block, problem in zip(blocks, pool.map(_problem, blocks), strict=True):
            results.append(problem)
            advance(block.end - block.start)
    return [problem for problem in results if problem], len(blocks), size


def _problem(block: Block) -> str | None:
    try:
        block.check()
    except (ValueError, OSError) as error:
        return str(error)
    return None


@contextmanager
def _progress_bar(name: str, size: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; nothing in a log file, where each dataset has its line."""
    from tqdm import tqdm

    with tqdm(
        total=size, unit="B", unit_scale=True, desc=name, disable=not sys.stderr.isatty()
    ) as bar:
        yield bar.update

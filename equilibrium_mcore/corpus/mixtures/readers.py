"""Where rows come from: local JSONL, Parquet, Arrow, `datasets` folders, and the Hub.

A source is cut into parts. A part is plain values, so that it travels to a worker, which reads
its rows in order. The parts of a source and the rows of a part are the same in every process.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.mixture import DatasetConfig
from equilibrium_mcore.corpus.mixtures.hub import hub_parts, stream_rows
from equilibrium_mcore.corpus.mixtures.parts import BadRowError, LinePlace, SourcePart
from equilibrium_mcore.data.compression import SUFFIXES, compression_of, refuse_pipe
from equilibrium_mcore.data.jsonl import parse_object
from equilibrium_mcore.data.text_files import lines_of_compressed, lines_of_range
from equilibrium_mcore.files.errors import reason

# Parts are read in a seeded order, so a source of many parts is sampled more evenly.
PARTS_WANTED = 64
RANGE_BYTES = (1 << 20, 32 << 20)  # least and most of a plain JSONL file
FOLDER_ROWS = (1_000, 50_000)  # of a `datasets` folder
BATCH_ROWS = 512
ENDINGS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
HUB_NAME = re.compile(r"[\w\-.]+/[\w\-.]+")


def is_hub(dataset: DatasetConfig) -> bool:
    """Whether the source is a name on the Hub: it looks like one and nothing here is called so."""
    if dataset.format == "hub" or dataset.data_files:
        return True
    source = dataset.source
    if source.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(source):
        return False
    return _format_of(Path(source)) is None and not Path(source).exists()


def local_files(dataset: DatasetConfig) -> list[Path]:
    """The files of a local source, sorted. A `datasets` folder counts as one.

    Raises FileNotFoundError when there are none, ValueError when their format is not known.
    """
    source = Path(dataset.source)
    refuse_pipe(source)
    if _is_saved_dataset(source):
        return [source]
    if source.is_file():
        found = [source]
    elif source.is_dir():
        found = [p for p in source.rglob("*") if p.is_file() and _wanted(p, dataset.format)]
    else:
        found = [Path(p) for p in glob.glob(str(source), recursive=True) if Path(p).is_file()]
    if not found:
        state = "holds no file to read" if source.is_dir() else "no such file or folder"
        raise FileNotFoundError(
            f"{dataset.name}: source {dataset.source}: {state}; read are files that end in "
            f"{', '.join(ENDINGS)}, JSONL also with {' or '.join(SUFFIXES)}. Correct the path, "
            f"or give another with --local {dataset.name}=PATH"
        )
    kinds = {dataset.format or _format_of(path) for path in found}
    if None in kinds or len(kinds) > 1:
        names = ", ".join(sorted({path.suffix or path.name for path in found}))
        raise ValueError(
            f"{dataset.name}: source {dataset.source}: found {names}; set `format` to say how to "
            f"read them, or give a pattern that matches one kind"
        )
    return sorted(found)


def parts_of(dataset: DatasetConfig) -> list[SourcePart]:
    """The parts of a source, in a fixed order. May download, when the source is on the Hub."""
    if is_hub(dataset):
        return hub_parts(dataset)
    parts: list[SourcePart] = []
    for path in local_files(dataset):
        if _is_saved_dataset(path):
            parts += _folder_parts(dataset, path)
        else:
            kind = dataset.format or _format_of(path)
            parts += _PARTS[str(kind)](dataset, path)
    return parts


def rows_of(
    dataset: DatasetConfig, part: SourcePart, *, skip: int = 0
) -> Iterator[tuple[object, Any]]:
    """(place, row) of a part from row `skip` on; a row is a mapping, or a BadRowError.

    `str` of a place names file and row.     Raises ValueError for a file that is damaged.
    """
    return _ROWS[part.kind](dataset, part, skip)


# -------------------------------------------------------------------------------------- JSONL


def _jsonl_parts(dataset: DatasetConfig, path: Path) -> list[SourcePart]:
    if compression_of(path) is not None:
        return [SourcePart("compressed", str(path))]
    size = path.stat().st_size
    step = _step(size, RANGE_BYTES)
    return [
        SourcePart("jsonl", str(path), start, min(start + step, size))
        for start in range(0, size, step)
    ]


def _step(size: int, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], size // PARTS_WANTED))


def _jsonl_rows(
    dataset: DatasetConfig, part: SourcePart, skip: int
) -> Iterator[tuple[object, Any]]:
    path, count = Path(part.path), 0
    for offset, line in lines_of_range(path, part.begin, part.end):
        if not line.strip():
            continue
        count += 1
        if count > skip:
            yield LinePlace(part.path, offset), _object_or_error(line)


def _compressed_rows(
    dataset: DatasetConfig, part: SourcePart, skip: int
) -> Iterator[tuple[str, Any]]:
    count = 0
    for number, line in lines_of_compressed(Path(part.path)):
        if not line.strip():
            continue
        count += 1
        if count > skip:
            yield f"{part.path}, line {number:,}", _object_or_error(line)


def _object_or_error(line: bytes) -> dict[str, Any] | BadRowError:
    try:
        return parse_object(line)
    except ValueError as error:
        return BadRowError(str(error))


# ---------------------------------------------------------------------------- Parquet and Arrow


def _parquet_parts(dataset: DatasetConfig, path: Path) -> list[SourcePart]:
    groups = _parquet(path).metadata.num_row_groups
    return [SourcePart("parquet", str(path), group, group + 1) for group in range(groups)]


def _parquet_rows(dataset: DatasetConfig, part: SourcePart, skip: int) -> Iterator[tuple[str, Any]]:
    file = _parquet(Path(part.path))
    before = sum(file.metadata.row_group(i).num_rows for i in range(part.begin))
    batches = file.iter_batches(
        batch_size=BATCH_ROWS, row_groups=list(range(part.begin, part.end)), use_threads=False
    )
    yield from _batch_rows(part.path, _sound(Path(part.path), batches), skip, before)


def _sound(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; pages are checked when they are read, by which the file has no name any more."""
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is a damaged Parquet file ({reason(error)})") from None
        if batch is None:
            return
        yield batch


def _parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} {_NEEDS_EXTRA}") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file, or damaged ({reason(error)})") from None


def _arrow_parts(dataset: DatasetConfig, path: Path) -> list[SourcePart]:
    return [SourcePart("arrow", str(path))]


def _arrow_rows(dataset: DatasetConfig, part: SourcePart, skip: int) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa
    except ImportError:
        raise ImportError(f"{part.path} {_NEEDS_EXTRA}") from None
    try:
        with pa.memory_map(part.path) as source:
            yield from _batch_rows(part.path, _record_batches(pa, source), skip, 0)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{part.path} is not Arrow data, or damaged ({reason(error)})") from None


def _record_batches(pa, source) -> Iterator[Any]:
    """The batches of an IPC file, or of an IPC stream: `datasets` writes streams."""
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
    else:
        for number in range(file.num_record_batches):
            yield file.get_batch(number)


def _batch_rows(path: str, batches, skip: int, before: int) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        if number + batch.num_rows <= skip:
            number += batch.num_rows
            continue
        for begin in range(max(0, skip - number), batch.num_rows, BATCH_ROWS):
            first = before + number + begin + 1
            try:
                piece = batch.slice(begin, BATCH_ROWS).to_pylist()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is damaged: a text from row {first:,} on is not UTF-8 ({error.reason})"
                ) from None
            for place, row in enumerate(piece, start=first):
                yield f"{path}, row {place:,}", row
        number += batch.num_rows


# ------------------------------------------------------------------------------------- folders


def _is_saved_dataset(path: Path) -> bool:
    names = ("dataset_dict.json", "dataset_info.json")
    return path.is_dir() and any((path / name).is_file() for name in names)


def _folder_parts(dataset: DatasetConfig, path: Path) -> list[SourcePart]:
    loaded = saved_dataset(str(path))
    parts = []
    if isinstance(loaded, dict):
        missing = [split for split in dataset.splits if split not in loaded]
        if missing:
            raise ValueError(
                f"{dataset.name}: {path} has no split {', '.join(missing)}; it has "
                f"{', '.join(loaded)}: correct `splits`"
            )
        splits = [(split, loaded[split]) for split in dataset.splits]
    else:
        splits = [("", loaded)]
    for split, rows in splits:
        step = _step(len(rows), FOLDER_ROWS)
        for begin in range(0, len(rows), step):
            end = min(begin + step, len(rows))
            parts.append(SourcePart("folder", str(path), begin, end, split))
    return parts


@lru_cache(maxsize=4)
def saved_dataset(path: str):
    """What `datasets.save_to_disk` wrote: a Dataset, or a mapping from split to Dataset."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{path} {_NEEDS_EXTRA}") from None
    return datasets.load_from_disk(path)


def _folder_rows(dataset: DatasetConfig, part: SourcePart, skip: int) -> Iterator[tuple[str, Any]]:
    loaded = saved_dataset(part.path)
    rows = (loaded[part.split] if part.split else loaded).with_format(None)
    for begin in range(part.begin + skip, part.end, BATCH_ROWS):
        batch = rows[begin : min(begin + BATCH_ROWS, part.end)]
        names = list(batch)
        for number, values in enumerate(zip(*batch.values(), strict=True), start=begin + 1):
            yield f"{part.path}, row {number:,}", dict(zip(names, values, strict=True))


_NEEDS_EXTRA = "needs the packages of an extra: pip install 'equilibrium_mcore[data]'"
_PARTS = {"jsonl": _jsonl_parts, "parquet": _parquet_parts, "arrow": _arrow_parts}
_ROWS = {
    "jsonl": _jsonl_rows,
    "compressed": _compressed_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "folder": _folder_rows,
    "stream": stream_rows,
}


def _format_of(path: Path) -> str | None:
    name = path.name
    for ending in SUFFIXES:
        name = name.removesuffix(ending)
    kind = ENDINGS.get(Path(name).suffix)
    return kind if kind == "jsonl" or name == path.name else None


def _wanted(path: Path, wanted: str | None) -> bool:
    return not path.name.startswith((".", "_")) and _format_of(path) in (
        (wanted,) if wanted else ENDINGS.values()
    )

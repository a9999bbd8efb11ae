"""Encoded examples on disk, so that the next start need not encode them again.

A folder of arrays, one file each, and `facts.json`, which is written last: without it the folder is
unfinished. Ranks that write at once write the same, each file whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from equilibrium_mcore.config.chat import ConversationsConfig, PreferencesConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.encode import EncodingReport, SourceCounts, encode_sources
from equilibrium_mcore.data.chat.examples import Examples
from equilibrium_mcore.data.chat.preferences import encode_preferences
from equilibrium_mcore.data.chat.render import Renderer
from equilibrium_mcore.data.chat.unpaired import encode_unpaired
from equilibrium_mcore.files.lock import FileLock
from equilibrium_mcore.files.lock_file import LockHeldError
from equilibrium_mcore.files.whole import whole_file, write_whole

logger = logging.getLogger(__name__)

Part = Literal["train", "validation"]
WAIT_SECONDS = 0.2
FACTS_FILE = "facts.json"
JUDGED = "judged_"  # files of what the data says of examples besides
FORMAT = 1  # another number where the same conversations become other examples


def load_or_encode(
    config: ConversationsConfig,
    renderer: Renderer,
    *,
    part: Part,
    max_tokens: int,
) -> tuple[Examples, EncodingReport]:
    """The examples of a part, from the cache where they are in it, and how many were left out.

    They are in it while files (size and time of change), tokenizer, template, `max_tokens` and
    `too_long` are those of before. Raises ConfigError as `encode_sources` does.
    """
    folder = None
    if config.cache_directory is not None:
        key = _key(config, renderer, part, max_tokens)
        folder = config.cache_directory / f"{config.name}-{part}-{key}"
        found = load_examples(folder)
        if found is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder, f"{config.name}: encoding {part}"):
            return load_examples(folder) or _encoded(config, renderer, part, max_tokens, folder)
    return _encoded(config, renderer, part, max_tokens, None)


def _encoded(
    config: ConversationsConfig,
    renderer: Renderer,
    part: Part,
    max_tokens: int,
    folder: Path | None,
) -> tuple[Examples, EncodingReport]:
    if isinstance(config, PreferencesConfig):
        encode = encode_unpaired if config.unpaired else encode_preferences
        examples, report = encode(config, renderer, part=part, max_tokens=max_tokens)
    else:
        examples, report = encode_sources(
            config.sources, renderer, part=part, max_tokens=max_tokens, too_long=config.too_long
        )
    if folder is None:
        return examples, report
    save_examples(folder, examples, report)
    saved = load_examples(folder)  # mapped, so that ranks of a host share it
    assert saved is not None
    return saved


@contextlib.contextmanager
def _one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """Of many ranks, one encodes and the others wait for it."""
    lock, said = FileLock(folder.with_name(f"{folder.name}.lock"), name), False
    while True:
        try:
            lock.acquire()
            break
        except LockHeldError as error:
            if not said and error.owner is not None:
                logger.info("%s: waiting for %s", name, error.owner)
                said = True
            time.sleep(WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()


def save_examples(folder: Path, examples: Examples, report: EncodingReport) -> None:
    """Write the arrays, then the facts."""
    for name in Examples.ARRAYS:
        with whole_file(folder / f"{name}.npy", "wb") as stream:
            np.save(stream, getattr(examples, name))
    for name, values in examples.judged.items():
        with whole_file(folder / f"{JUDGED}{name}.npy", "wb") as stream:
            np.save(stream, values)
    facts = {
        "judged": list(examples.judged),
        "fingerprint": examples.fingerprint,
        "names": list(examples.names),
        "unit": report.unit,
        "sources": {name: asdict(counts) for name, counts in report.sources.items()},
    }
    write_whole(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")


def load_examples(folder: Path) -> tuple[Examples, EncodingReport] | None:
    """What was saved, mapped and not read; None where there is nothing, or not all of it."""
    if not (folder / FACTS_FILE).is_file():
        return None
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in Examples.ARRAYS}
    judged = {
        name: np.load(folder / f"{JUDGED}{name}.npy", mmap_mode="r")
        for name in facts.get("judged", ())
    }
    examples = Examples(**arrays, names=tuple(facts["names"]), judged=judged)
    # The hash was taken of what was encoded; to take it again would read everything.
    examples.__dict__["fingerprint"] = facts["fingerprint"]
    sources = {name: SourceCounts(**counts) for name, counts in facts["sources"].items()}
    return examples, EncodingReport(sources, facts.get("unit", "conversations"))


def _key(config: ConversationsConfig, renderer: Renderer, part: str, max_tokens: int) -> str:
    files = [_files(getattr(source, part)) for source in config.sources]
    values = {
        "format": FORMAT,
        "tokenizer": renderer.vocabulary.tokenizer.unique_identifiers,
        "template": renderer.jinja(),
        "max_tokens": max_tokens,
        "too_long": config.too_long,
        "sources": [source.name for source in config.sources],
        "files": files,
    }
    if isinstance(config, PreferencesConfig):  # whose pairs are measured with their padding
        values |= {"type": config.type, "multiple": config.document_multiple}
        values |= {"unpaired": True, "judged": 1} if config.unpaired else {"judged": 1}
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _files(paths: Sequence[Path]) -> list[list]:
    try:
        return [[str(path), (s := path.stat()).st_size, s.st_mtime_ns] for path in paths]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename}: no such file; name the JSONL files of the conversations"
        ) from None

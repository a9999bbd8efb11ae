"""Whether a dataset that is there is the one that a command would make: then it is done.

A command that is called again, by a scheduler or after a kill that came too late, must not fail for
having succeeded. What differs is reported by name, as the journal does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.data.indexed_files import (
    Manifest,
    dataset_paths,
    read_header,
    read_manifest,
)
from equilibrium_mcore.data.inputs import Input


@dataclass(frozen=True)
class Request:
    """What a preprocessing command asks for, as far as it shows in the datasets."""

    inputs: Sequence[Input]
    tokenizer_sha256: str
    eod: int
    append_eod: bool
    partition: str | None
    skip_bad_lines: bool


def find_finished(prefixes: dict[str, Path], request: Request) -> dict[str, Manifest]:
    """The manifests, by key, of those datasets that are there, whole, and of this request.

    Raises FileExistsError for anything else that is there, and ValueError for a dataset that is
    damaged.
    """
    found = {}
    for key, prefix in prefixes.items():
        existing = [str(path) for path in dataset_paths(prefix) if path.exists()]
        if not existing:
            continue
        manifest = _manifest_of(prefix)
        differences = ["no manifest says what it is"]
        if manifest is not None:
            differences = differences_from(prefix, manifest, request)
        if differences:
            raise refusal(existing, "; ".join(differences[:4]))
        found[key] = manifest
    return found


def refusal(existing: Sequence[str], why: str) -> FileExistsError:
    """The error of a command whose output's names are taken."""
    return FileExistsError(
        f"{', '.join(existing[:6])} exists already and is not what this command makes: {why}. Pass "
        f"--overwrite to replace it, or choose another --output-prefix"
    )


def _manifest_of(prefix: Path) -> Manifest | None:
    if not all(path.is_file() for path in dataset_paths(prefix)):
        return None
    read_header(prefix, may_be_empty=True)
    return read_manifest(prefix)


def differences_from(prefix: Path, manifest: Manifest, request: Request) -> list[str]:
    """What the dataset was made of that the request is not: all that a journal compares."""
    pairs = {
        "its tokenizer's SHA-256": (manifest.tokenizer_sha256[:16], request.tokenizer_sha256[:16]),
        "its end-of-document id": (manifest.eod, request.eod),
        "--append-eod": (manifest.append_eod, request.append_eod),
        "its partition": (manifest.partition, request.partition),
        "its number of inputs": (len(manifest.inputs), len(request.inputs)),
    }
    texts = [
        f"{name} was {old!r} and is {new!r}" for name, (old, new) in pairs.items() if old != new
    ]
    made_ns = dataset_paths(prefix)[2].stat().st_mtime_ns
    for entry, item in zip(manifest.inputs, request.inputs, strict=False):
        if (entry["path"], entry["bytes"]) != (str(item.path), item.size):
            texts.append(f"{entry['path']} with {entry['bytes']:,} bytes was an input")
        elif entry.get("modified_ns", item.modified_ns) != item.modified_ns:
            texts.append(f"{item.path} is another file than it was, or was changed")
        elif item.modified_ns > made_ns:  # of a version that did not note the time
            texts.append(f"{item.path} was changed after it")
    if manifest.skipped_lines and not request.skip_bad_lines:
        texts.append(f"{manifest.skipped_lines:,} bad lines were left out by --skip-bad-lines")
    return texts

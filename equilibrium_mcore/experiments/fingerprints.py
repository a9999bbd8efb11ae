"""What tells whether a step's inputs are those of before."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

WHOLE_BYTES = 16 << 20  # files up to this size are identified by their content
Fingerprint = dict[str, Any]


def fingerprint(path: Path) -> Fingerprint | None:
    """What identifies a file or a folder; None where there is nothing.

    A file by its SHA-256, or, where it is large, by size and time of change. A folder by those of
    all its files, so that its manifest identifies a large dataset too. Hidden names and locks are
    no content.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return None
    digest, count = hashlib.sha256(), 0
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not _passing(name) and file.is_file():
                entry = [str(file.relative_to(path)), _of_file(file)]
                digest.update(json.dumps(entry, sort_keys=True).encode() + b"\n")
                count += 1
    return {"files": count, "sha256": digest.hexdigest()}


def _of_file(path: Path) -> Fingerprint:
    facts = path.stat()
    if facts.st_size > WHOLE_BYTES:
        return {"bytes": facts.st_size, "changed_ns": facts.st_mtime_ns}
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _passing(name: str) -> bool:
    """Hidden files tell nothing, but a checkpoint's `.metadata`; nor do locks."""
    return (name.startswith(".") and name != ".metadata") or name.endswith((".lock", ".tmp"))

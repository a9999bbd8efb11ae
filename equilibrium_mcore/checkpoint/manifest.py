"""What a checkpoint's files hold, by size and hash, and whether they still do.

    manifest.json   {"format": 1, "files": {"__0_0.distcp": {"bytes": 1048, "sha256": "..."}, ...}}

SHA-256 notices every flipped bit and every file that stands for another, and processors have
instructions for it. Only the standard library is used here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.files.errors import reason
from equilibrium_mcore.files.whole import write_whole

MANIFEST_FILE = "manifest.json"
FORMAT = 1
HASH = "sha256"

Files = dict[str, dict[str, Any]]  # name -> {"bytes": size, "sha256": hexadecimal}


@dataclass(frozen=True)
class Damage:
    """One file of a checkpoint that is not what it should be."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


class DamagedCheckpointError(ConfigError):
    """A checkpoint that cannot be used; `damages` names the files and what is wrong with each."""

    def __init__(
        self, checkpoint: Path, damages: Iterable[Damage], *, way_out: str | None = None
    ) -> None:
        self.checkpoint, self.damages, self.way_out = Path(checkpoint), list(damages), way_out
        problems = [str(damage) for damage in self.damages]
        super().__init__(problems + ([way_out] if way_out else []), source=checkpoint)

    def _text(self) -> str:
        lines = [f"checkpoint {self.checkpoint} is damaged:"]
        lines += [f"  {damage}" for damage in self.damages]
        return "\n".join(lines + ([self.way_out] if self.way_out else []))

    def __reduce__(self):
        return _rebuild, (self.checkpoint, self.damages, self.way_out)


def _rebuild(checkpoint: Path, damages: list[Damage], way_out: str | None):
    return DamagedCheckpointError(checkpoint, damages, way_out=way_out)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest holds them."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, HASH).hexdigest()
        return {"bytes": stream.tell(), HASH: digest}


def write_manifest(folder: Path, files: Files) -> None:
    """Write the manifest of `folder`, the last of its files."""
    values = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_whole(folder / MANIFEST_FILE, json.dumps(values, indent=1) + "\n")


def read_manifest(folder: Path) -> Files | None:
    """The files that the manifest names; None where there is none, as in older checkpoints.

    Raises DamagedCheckpointError for a manifest that cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, and this version reads {FORMAT}")
        files = values["files"]
        for name, facts in files.items():
            if Path(name).name != name or {*facts} != {"bytes", HASH}:
                raise ValueError(f"{name!r} is no entry of a file")
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        damage = Damage(MANIFEST_FILE, f"is no manifest: {reason(error)}")
        raise DamagedCheckpointError(folder, [damage]) from None


def wrong_sizes(folder: Path, files: Files) -> list[Damage]:
    """The files that are gone, or longer or shorter than the manifest says. Cheap."""
    damages = []
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            damages.append(Damage(name, f"is missing; expected {facts['bytes']:,} bytes"))
        elif (found := path.stat().st_size) != facts["bytes"]:
            damages.append(Damage(name, f"expected {facts['bytes']:,} bytes, found {found:,}"))
    return damages


def wrong_hashes(folder: Path, files: Files, names: Iterable[str]) -> list[Damage]:
    """Which of `names` hold other bytes than the manifest says. Reads them whole."""
    damages = []
    for name in names:
        try:
            found = describe_file(folder / name)[HASH]
        except OSError as error:
            damages.append(Damage(name, f"cannot be read: {reason(error)}"))
            continue
        if found != files[name][HASH]:
            what = f"expected {HASH} {files[name][HASH][:16]}..., found {found[:16]}..."
            owner = next((other for other in files if files[other][HASH] == found), None)
            damages.append(Damage(name, what + (f", which is {owner}'s" if owner else "")))
    return damages


def shares(files: Files, parts: int) -> list[list[str]]:
    """The files in `parts` lists of about equal bytes: the largest first, to the least loaded."""
    lists: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = loads.index(min(loads))
        lists[least].append(name)
        loads[least] += files[name]["bytes"]
    return lists

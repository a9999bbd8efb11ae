"""The manifest of a prepared mixture: what came in, what was dropped and why, what was written."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.files.errors import reason
from equilibrium_mcore.files.whole import write_whole

NAME = "manifest.json"
FORMAT_VERSION = 1
PACKAGES = (
    "equilibrium_mcore",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "fastokens",
    "datasets",
    "pyarrow",
    "zstandard",
    "datatrove",
)


@dataclass(frozen=True)
class OutputFacts:
    """One file or dataset that was written. `prefix` counts from the manifest's folder.

    `tokens` are examples in posttrain phases. `payload_sha256` is that of the .bin, or of the
    training lines followed by those held out.
    """

    prefix: str
    stage: int | None
    documents: int
    tokens: int
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int
    payload_sha256: str
    documents_sha256: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SourceFacts:
    """One dataset on its way. Every row that was read is in exactly one of empty, bad, dropped,
    not_needed (sampling left it out) and documents.
    """

    name: str
    source: str
    mix_ratio: float
    share: float
    needed_tokens: float | None
    rows: int
    characters_in: int
    empty: int
    bad: int
    first_bad: str
    dropped: dict[str, int]
    not_needed: int
    documents: int
    tokens: int
    train_tokens: int
    validation_tokens: int
    epochs: float | None
    max_epochs: float
    inputs: list[dict[str, Any]]
    outputs: list[OutputFacts]


@dataclass(frozen=True)
class MixtureManifest:
    """A prepared mixture. `mixture` holds its effective settings, `request` their fingerprint."""

    name: str
    phase: str
    kind: str
    mixture: dict[str, Any]
    request: str
    tokenizer: dict[str, Any] | None
    sample_rows: int | None
    split: str
    blends: list[str]
    datasets: list[SourceFacts]
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Into `folder`, whole or not at all."""
        write_whole(folder / NAME, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


def read_mixture_manifest(folder: Path) -> MixtureManifest:
    """The manifest in a prepared folder. Raises FileNotFoundError and ValueError."""
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {folder} holds no prepared mixture, or its preparation has "
            f"not ended. Make it with `{command('prepare')}`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["datasets"] = [
            SourceFacts(**{**d, "outputs": [OutputFacts(**o) for o in d["outputs"]]})
            for d in values["datasets"]
        ]
        return MixtureManifest(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a manifest of `{command('prepare')}` ({reason(error)})"
        ) from None


def versions() -> dict[str, str]:
    """Of Python and of the packages that have a part in the result, as far as they are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""A small valid run, as plain values, that each test changes in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.references import merge
from equilibrium_mcore.config.schema import RunConfig

RUN = {
    "name": "test",
    "output_directory": "runs/test",
    "model": "equilibrium_tiny",
    "data": {
        "name": "blend",
        "tokenizer": {"type": "SentencePieceTokenizer", "model": "tokenizer.model"},
        "sources": [
            {"name": "code", "prefix": "data/code", "weight": 0.7},
            {"name": "prose", "prefix": "data/prose", "weight": 1},
        ],
    },
    "training": {"sequence_length": 64, "global_batch_size": 8, "steps": 100, "precision": "fp32"},
}

RUN_YAML = """\
name: test
output_directory: runs/test
model: equilibrium_tiny
data:
  name: blend
  tokenizer: {type: SentencePieceTokenizer, model: tokenizer.model}
  sources:
    - {name: code, prefix: data/code, weight: 0.7}
    - {name: prose, prefix: data/prose, weight: 1}
training: {sequence_length: 64, global_batch_size: 8, steps: 100, precision: fp32}
"""


def changed(path: str, value: object) -> dict:
    """`{"a": {"b": value}}` for the path `a.b`."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.fixture
def build():
    """Builds the run with some keys changed: `build({"training.steps": 3}, world_size=4)`."""

    def build_run(changes: dict[str, object] | None = None, **facts) -> RunConfig:
        values = RUN
        for path, value in (changes or {}).items():
            values = merge(values, changed(path, value))
        if isinstance(values["model"], dict):
            values = {**values, "model": {"from": RUN["model"], **values["model"]}}
        return run_from_mapping(values, **facts)

    return build_run


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The same run as a file."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN_YAML)
    return path

"""A prepared mixture of each kind, and weights, as small files in the test's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from equilibrium_mcore.config.references import resolve
from equilibrium_mcore.config.yaml_io import to_yaml

TOKENIZER = {"type": "SentencePieceTokenizer", "model": "tokenizer.model"}
BLEND = {
    "name": "blend",
    "tokenizer": TOKENIZER,
    "sources": [{"name": "web", "prefix": "data/web_text_document", "weight": 1.0}],
}
CONVERSATIONS = {
    "type": "conversations",
    "name": "chats",
    "sources": [
        {
            "name": "chats",
            "train": ["data/chats.train.jsonl"],
            "validation": ["data/held_out.jsonl"],
        }
    ],
    "template": "chatml",
}

PREFERENCES = {**CONVERSATIONS, "type": "preferences"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands are called in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prepared(here: Path) -> Callable[..., Path]:
    """What preparing a mixture writes, without the data: `prepared("pretrain/phase1/mixture1")`."""

    def make(name: str, data: dict = BLEND, *, place: Path | None = None, **manifest) -> Path:
        folder = place or here / "data" / name
        folder.mkdir(parents=True)
        file = "conversations.yaml" if "type" in data else "blend.yaml"
        if data.get("type") == "preferences":
            file = "preferences.yaml"
        (folder / file).write_text(to_yaml(data))
        facts = {"name": name.replace("/", "_"), "phase": "any", "blends": [file], **manifest}
        (folder / "manifest.json").write_text(json.dumps(facts))
        return folder

    return make


@pytest.fixture
def weights(here: Path) -> Path:
    """The folder of a run that was saved, as far as its config tells."""
    folder = here / "before"
    folder.mkdir()
    model = {"from": "llama_1b", "name": "trained_before"}
    values = {"model": resolve(model, kind="model", folder=here), "data": BLEND}
    (folder / "config.yaml").write_text(to_yaml(values))
    return folder

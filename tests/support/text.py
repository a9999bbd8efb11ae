"""Text and a tokenizer that the tests of tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.config.data import DataConfig, SourceConfig, TokenizerConfig
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from tests.support.made_up_text import made_up_code

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some hundred documents of code. Not this project's: tests must not change with it."""
    return made_up_code(400)


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list], Path]:
    def write(path: Path, documents: list) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer_config(tmp_path_factory, texts, write_jsonl) -> TokenizerConfig:
    """A SentencePiece tokenizer of 600 tokens, trained on `texts`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    source = write_jsonl(folder / "text.jsonl", texts)
    model = folder / "tokenizer.model"
    train_tokenizer(inputs=[source], output=model, vocab_size=600, threads=1)
    return TokenizerConfig(type="SentencePieceTokenizer", model=model)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_config) -> Tokenizer:
    return load_tokenizer(tokenizer_config)


@pytest.fixture
def write_dataset() -> Callable[[Path, list[np.ndarray]], Path]:
    """Documents of token ids to a dataset without manifest, as Megatron-LM would leave it."""

    def write(prefix: Path, documents: list[np.ndarray]) -> Path:
        with IndexedWriter(prefix, np.uint16, overwrite=True) as writer:
            tokens = np.concatenate(documents).astype(np.uint16)
            writer.add(tokens.tobytes(), np.array([len(d) for d in documents], np.int32))
            writer.finish()
            for ending in ("bin", "idx"):
                prefix.with_name(f"{prefix.name}.{ending}.partial").rename(f"{prefix}.{ending}")
        return prefix

    return write


@pytest.fixture
def two_sources(tmp_path, tokenizer_config, write_dataset) -> DataConfig:
    """Source a holds ids 3..102, source b ids 103..202; a's share is 0.75."""
    generator = np.random.default_rng(0)
    sources = []
    for name, first, weight in (("a", 3, 3.0), ("b", 103, 1.0)):
        documents = [
            generator.integers(first, first + 100, size=generator.integers(5, 200))
            for _ in range(100)
        ]
        prefix = write_dataset(tmp_path / f"{name}_text_document", documents)
        sources.append(SourceConfig(name=name, prefix=prefix, weight=weight))
    return DataConfig(name="two", tokenizer=tokenizer_config, sources=sources, split="90,8,2")

"""Tokenizers and examples that the tests of chats share."""

from __future__ import annotations

import pytest

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat.support import make_tokenizers

TOKENIZERS = ("sentencepiece", "llama3", "qwen2")


@pytest.fixture(scope="session")
def chat_configs(tmp_path_factory, tokenizer_config, texts) -> dict[str, TokenizerConfig]:
    return make_tokenizers(tmp_path_factory.mktemp("chat"), tokenizer_config, texts)


@pytest.fixture(scope="session")
def chat_tokenizers(chat_configs) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(config) for name, config in chat_configs.items()}

"""The exported tokenizer gives the ids of training."""

from __future__ import annotations

import inspect
import json

import pytest
from transformers import AutoTokenizer

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.hugging_face.tokenizer_files import PROBE, check_same_ids, write_tokenizer


def real_texts() -> list[str]:
    import pydoc_data.topics
    import string
    import subprocess

    code = [inspect.getsource(module) for module in (subprocess, string, inspect)]
    return [PROBE, *code, *pydoc_data.topics.topics.values()]


@pytest.fixture(scope="module")
def ours(sentencepiece_model):
    return load_tokenizer(TokenizerConfig(type="SentencePieceTokenizer", model=sentencepiece_model))


def test_auto_tokenizer_gives_the_same_ids_and_text(ours, exported):
    theirs = AutoTokenizer.from_pretrained(exported("hybrid"), trust_remote_code=True)
    texts = real_texts()
    assert sum(map(len, texts)) > 500_000
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eod and theirs.pad_token_id == ours.pad_id
    assert theirs.decode([ours.eod], skip_special_tokens=True) == ""
    batch = theirs(["a", "a longer text"], padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][0, -1] == 1


def test_a_hugging_face_tokenizer_is_copied(ours, tmp_path):
    """A tokenizer.json reads special tokens in a text, in training as in the release."""
    source, target, second = tmp_path / "source", tmp_path / "target", tmp_path / "second"
    for folder in (source, target, second):
        folder.mkdir()
    write_tokenizer(ours, source)
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=source)
    write_tokenizer(load_tokenizer(config), target)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(target)("a<|endoftext|>")["input_ids"][-1] == ours.eod
    # Where no settings lie beside it, they are made.
    (source / "tokenizer_config.json").unlink()
    write_tokenizer(load_tokenizer(config), second)
    assert AutoTokenizer.from_pretrained(second).eos_token == "<|endoftext|>"


def test_other_ids_are_noticed(ours, tmp_path):
    write_tokenizer(ours, tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="gives other ids"):
        check_same_ids(ours, tmp_path, [PROBE])


def test_a_model_that_normalizes_is_refused(tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(inspect.getsource(inspect).splitlines()[:800]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "other"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    config = TokenizerConfig(type="SentencePieceTokenizer", model=tmp_path / "other.model")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ValueError, match="normalization_rule_name=identity, add_dummy_prefix=false"
    ):
        write_tokenizer(load_tokenizer(config), tmp_path / "out")

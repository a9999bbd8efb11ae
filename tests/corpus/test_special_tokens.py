"""Control tokens added to a copy: old ids stay, text is encoded as before, nothing is replaced."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.special_tokens import add_special_tokens
from equilibrium_mcore.data.chat.vocabulary import ChatVocabulary
from equilibrium_mcore.data.tokenizer import load_tokenizer
from tests.support.byte_level import train_byte_level

TOOL = Path(__file__).parents[2] / "tools" / "add_special_tokens.py"
NEW = ["<|eot_id|>", "<|im_end|>", "<|mine|>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory, texts) -> TokenizerConfig:
    folder = train_byte_level(tmp_path_factory.mktemp("tokens") / "old", texts, "llama3")
    return TokenizerConfig(type="HuggingFaceTokenizer", model=folder)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_ids_stay_and_text_is_encoded_as_before(
    kind, tokenizer_config, byte_level, tmp_path, texts
):
    config = tokenizer_config if kind == "sentencepiece" else byte_level
    output = tmp_path / ("new.model" if kind == "sentencepiece" else "new")
    added = add_special_tokens(config, NEW, output)
    old, new = load_tokenizer(config), load_tokenizer(config.model_copy(update={"model": output}))
    size = old.vocab_size
    known = kind == "sentencepiece"  # <|im_end|> is there
    count = 2 if known else 3
    assert added.vocab_size == (size, size + count) == (old.vocab_size, new.vocab_size)
    assert added.ids["<|eot_id|>"] == (None, size)
    assert added.ids["<|im_end|>"] == ((4, 4) if known else (None, size + 1))
    vocabulary = ChatVocabulary(new)
    for text in texts[:100]:
        assert new.encode(text) == old.encode(text) or any(token in text for token in NEW)
    for token in NEW:
        assert vocabulary.control(token) == added.ids[token][1]
        ids = vocabulary.encode(f"a {token}b")
        assert not set(ids) & set(vocabulary.controls.values()) and new.decode(ids) == f"a {token}b"
    assert (new.eod, new.pad_id) == (old.eod, old.pad_id)


def test_nothing_is_replaced(tokenizer_config, byte_level, tmp_path):
    taken = tmp_path / "taken.model"
    taken.write_text("mine")
    with pytest.raises(FileExistsError, match=r"taken\.model exists"):
        add_special_tokens(tokenizer_config, NEW, taken)
    assert taken.read_text() == "mine"
    add_special_tokens(tokenizer_config, NEW, taken, overwrite=True)
    with pytest.raises(ValueError, match="is the tokenizer itself"):
        path = tokenizer_config.model
        add_special_tokens(tokenizer_config, NEW, path, overwrite=True)
    (tmp_path / "tokenizer_config.json").write_text("mine")  # a file that goes along
    with pytest.raises(FileExistsError, match=r"tokenizer_config\.json exists"):
        add_special_tokens(byte_level, NEW, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_pieces_of_text_are_refused(kind, tokenizer_config, byte_level, tmp_path):
    config = tokenizer_config if kind == "sentencepiece" else byte_level
    tokenizer = load_tokenizer(config)
    vocabulary = ChatVocabulary(tokenizer)
    piece = next(
        p for p in map(vocabulary.spelled, reversed(range(tokenizer.vocab_size))) if len(p) > 2
    )
    if kind == "sentencepiece":
        piece = next(
            p for p in map(vocabulary.spelled, range(300, 600)) if len(p) > 1 and "▁" not in p
        )
    output = tmp_path / "x.model"
    with pytest.raises(ValueError, match="is a piece that text is made of"):
        add_special_tokens(config, [piece], output)
    for tokens in (["x"], [" <a>"], ["<a>", "<a>"]):
        with pytest.raises(ValueError, match=r"two characters or more|name each token once"):
            add_special_tokens(config, tokens, output)
    assert not output.exists()


def test_the_tool(byte_level, tmp_path, capsys, monkeypatch):
    """A token that is there as an ordinary one becomes a control token under its old id."""
    source = tmp_path / "ordinary"
    source.mkdir()
    values = json.loads((byte_level.model / "tokenizer.json").read_text())
    values["added_tokens"][1]["special"] = False  # <|im_start|>
    (source / "tokenizer.json").write_text(json.dumps(values))
    words = [str(TOOL), str(source), "--output", str(tmp_path / "new"), "--template", "chatml"]
    monkeypatch.setattr(sys, "argv", words)
    for status, text in ((0, "set model.vocab_size to 901 or more"), (1, "exists: choose another")):
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(TOOL), run_name="__main__")
        printed = capsys.readouterr()
        assert leaving.value.code == status and text in printed.out + printed.err
        if not status:
            assert "1  <|im_start|>  (was 1)" in printed.out and "900  <|im_end|>\n" in printed.out
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=tmp_path / "new")
    assert ChatVocabulary(load_tokenizer(config)).control("<|im_start|>") == 1

"""Tokenizers give text back exactly, and say what is wrong with a file."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
from equilibrium_mcore.data.tokenizer import load_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "  two in front",
    "two behind  ",
    "\tif x:\r\n\t\treturn 1  # tabs\n\n\n",
    "1234567890 0x1F 3.14",
    "héllo, Привет, 你好, שלום, 🎉👩‍💻",
    "e\u0301 \ufb01 \u00a0 \u3000 \u200b",
    "\u2581 is how SentencePiece writes a space \u2581\u2581",
    "control \x00\x01\x7f",
    "<|endoftext|> and <unk> and <0x41> spelled out",
]


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory, texts):
    """A byte-level BPE tokenizer.json as Hugging Face models have it."""
    folder = tmp_path_factory.mktemp("hugging_face")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|finis|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.enable_truncation(max_length=8)  # must not cut documents
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|finis|>"}, "pad_token": None})
    )
    return folder


def test_sentencepiece_round_trip_is_exact(tokenizer, texts):
    for text in HARD_TEXTS + texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
        assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_round_trip_of_random_unicode(tokenizer):
    generator = random.Random(1)
    for _ in range(300):
        points = (generator.choice([0x7F, 0x7FF, 0xD7FF, 0x10FFFF]) for _ in range(30))
        text = "".join(chr(generator.randrange(limit)) for limit in points)
        text = "".join(c for c in text if not 0xD800 <= ord(c) <= 0xDFFF)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids(tokenizer):
    assert tokenizer.vocab_size == 600
    assert (tokenizer.unk_id, tokenizer.eod, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.eos == tokenizer.eod and tokenizer.bos_id is None
    assert tokenizer.tokenize("ab") == tokenizer.encode("ab")
    assert tokenizer.detokenize(tokenizer.encode("ab")) == "ab"
    assert tokenizer.files() == [tokenizer.path]


def test_digits_stand_alone(tmp_path, write_jsonl, texts):
    source = write_jsonl(tmp_path / "text.jsonl", [*texts, *["the year 2026\n" * 50] * 50])
    model = tmp_path / "tokenizer.model"
    train_tokenizer(inputs=[source], output=model, vocab_size=600, threads=1)
    trained = load_tokenizer(TokenizerConfig(type="SentencePieceTokenizer", model=model))
    assert len(trained.encode("the year")) < 4
    assert len(trained.encode("2026")) == 4


def test_hugging_face_round_trip_and_ids(byte_level_folder, texts):
    for model in (byte_level_folder, byte_level_folder / "tokenizer.json"):
        loaded = load_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=model))
        for text in HARD_TEXTS + texts[:50]:
            assert loaded.decode(loaded.encode(text)) == text
        assert loaded.decode([loaded.eod]) == ""
        assert loaded.eod == loaded.backend.token_to_id("<|finis|>")
        assert loaded.pad == -1 and loaded.pad_id is None
        assert {path.name for path in loaded.files()} == {
            "tokenizer.json",
            "tokenizer_config.json",
        }


def test_identifiers_hold_contents_not_paths(tmp_path, tokenizer, tokenizer_config):
    copy = tmp_path / "other_name.model"
    copy.write_bytes(tokenizer.path.read_bytes())
    moved = load_tokenizer(tokenizer_config.model_copy(update={"model": copy}))
    assert moved.unique_identifiers == tokenizer.unique_identifiers
    assert moved.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_missing_file_and_empty_folder(tmp_path, kind):
    for model in (tmp_path / "no.model", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(model)):
            load_tokenizer(TokenizerConfig(type=kind, model=model))


def test_damaged_and_swapped_files(tmp_path, tokenizer):
    damaged = tmp_path / "bad.model"
    damaged.write_bytes(tokenizer.path.read_bytes()[:500] + b"junk")
    with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
        load_tokenizer(TokenizerConfig(type="SentencePieceTokenizer", model=damaged))
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a Hugging Face"):
        load_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=broken))
    with pytest.raises(ValueError, match="set the type to SentencePieceTokenizer"):
        load_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=tokenizer.path))


def test_no_end_of_document(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "stop": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.add_special_tokens([AddedToken("stop", special=True)])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=path)
    with pytest.raises(ValueError, match=r"<\|endoftext\|>.*end_of_document"):
        load_tokenizer(config)
    assert load_tokenizer(config.model_copy(update={"end_of_document": "stop"})).eod == 1
    with pytest.raises(ValueError, match="has no token 'halt'"):
        load_tokenizer(config.model_copy(update={"end_of_document": "halt"}))


def test_training_errors(tmp_path, write_jsonl, texts):
    source = write_jsonl(tmp_path / "text.jsonl", texts[:5])
    output = tmp_path / "out" / "tokenizer.model"
    with pytest.raises(ValueError, match="vocab-size 300 is too small"):
        train_tokenizer(inputs=[source], output=output, vocab_size=300)
    with pytest.raises(ValueError, match="a vocabulary of 60000 cannot be made"):
        train_tokenizer(inputs=[source], output=output, vocab_size=60000)
    with pytest.raises(ValueError, match=r"text\.jsonl, line 1: .*'body'"):
        train_tokenizer(inputs=[source], output=output, vocab_size=600, json_key="body")
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        train_tokenizer(inputs=[tmp_path / "no.jsonl"], output=output, vocab_size=600)
    assert not output.exists()

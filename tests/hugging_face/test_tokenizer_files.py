"""The exported tokenizer gives the ids of training."""

from __future__ import annotations

import inspect
import json
import sys

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.hugging_face.tokenizer_check import print_tokenizer_notes, tokenizer_notes
from equilibrium_mcore.hugging_face.tokenizer_files import PROBE, check_same_ids, write_tokenizer
from tests.support.made_up_text import made_up_code
from tests.support.runs import tiny_run


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


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
THREE_DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), BYTES]
)
BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
ADDING = {
    "bos": processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    ),
    "both, in a sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 0), (END, 1)]
            ),
        ]
    ),
    "roberta": processors.RobertaProcessing((END, 1), (BEGIN, 0)),
    "nothing": None,
}


def made_up_tokenizer(folder, *, split=BYTES, adding=None, **settings):
    """A byte-level tokenizer of numbers and made-up words, with the settings beside it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    numbers = [
        " ".join(str(n * n) for n in range(begin, begin + 90)) for begin in range(0, 900, 90)
    ]
    texts = [*made_up_code(30, seed=1), *numbers * 5, "don't we'll cafe\u0301"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BEGIN, END, TURN, "<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if adding is not None:
        backend.post_processor = adding
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BEGIN, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **settings}))
    return folder


def loaded(folder, **settings):
    return load_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=folder, **settings))


@pytest.mark.parametrize("adding", list(ADDING))
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}])
def test_nothing_is_put_at_the_ends_of_a_text(tmp_path, adding, flags):
    source = made_up_tokenizer(tmp_path / "source", adding=ADDING[adding], **flags)
    ours, folder = loaded(source), tmp_path / "out"
    folder.mkdir()
    said = write_tokenizer(ours, folder)
    assert bool(said) == (adding != "nothing") and all(BEGIN in text for text in said)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (PROBE, "ban kela", "", f"{END} 1234"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs(["a", "b"], padding=False)["input_ids"] == [ours.encode("a"), ours.encode("b")]
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))  # as other programs load it
    assert alone.encode("ban kela").ids == ours.encode("ban kela")


@pytest.mark.parametrize(
    ("named", "split", "kept"),
    [
        ("Qwen2Tokenizer", THREE_DIGITS, False),
        ("GPT2Tokenizer", THREE_DIGITS, False),
        ("GPT2Tokenizer", BYTES, True),
        ("PreTrainedTokenizerFast", THREE_DIGITS, True),
    ],
)
def test_a_class_that_builds_another_tokenizer_is_not_named(tmp_path, named, split, kept):
    source = made_up_tokenizer(tmp_path / "source", split=split, tokenizer_class=named)
    ours, folder = loaded(source), tmp_path / "out"
    folder.mkdir()
    said = write_tokenizer(ours, folder)
    assert len(said) == (not kept) and all(f"tokenizer_class {named}" in text for text in said)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == (named if kept else "PreTrainedTokenizerFast")
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (PROBE, "12345 1234567 998001", "cafe\u0301 don't"):
        assert theirs(text)["input_ids"] == ours.encode(text)


def test_the_end_of_documents_is_the_end_of_text_of_the_release(tmp_path):
    source = made_up_tokenizer(tmp_path / "source")
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END}}))
    for end, said in ((None, 0), (TURN, 1)):
        ours, folder = loaded(source, end_of_document=end), tmp_path / f"out{said}"
        folder.mkdir()
        assert len(write_tokenizer(ours, folder)) == said
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.eos_token_id == ours.eod == (1, 2)[said]
        assert theirs.pad_token_id == ours.eod  # as generation_config.json has it


def test_space_marks_as_sentencepiece_has_them(ours, sentencepiece_model, tmp_path):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    text = "a\u2581b \u2581 c"
    config = TokenizerConfig(type="SentencePieceTokenizer", model=sentencepiece_model)
    plain = load_tokenizer(config.model_copy(update={"space_mark": "space"}))
    assert plain.encode(text) == library.encode(text) != ours.encode(text)
    assert plain.encode_batch([text, "a"], threads=2) == library.encode([text, "a"])
    assert (ours.decode(ours.encode(text)), plain.decode(plain.encode(text))) == (text, "a b   c")
    assert plain.fingerprint != ours.fingerprint  # data of one are not data of the other
    write_tokenizer(plain, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for other in (*real_texts()[:4], text):
        assert theirs(other)["input_ids"] == library.encode(other)
    with pytest.raises(ValueError, match="space_mark='space' is for SentencePiece"):
        loaded(made_up_tokenizer(tmp_path / "source"), space_mark="space")


def test_what_an_export_will_make_of_it_is_told_before_training(data, tmp_path, capsys):
    good = tiny_run(data, tmp_path / "run")
    assert tokenizer_notes(good) == []

    def with_tokenizer(**settings):
        tokenizer = TokenizerConfig(type="HuggingFaceTokenizer", **settings)
        changed = good.data.model_copy(update={"tokenizer": tokenizer})
        return good.model_copy(update={"data": changed})

    qwen = made_up_tokenizer(tmp_path / "a", split=THREE_DIGITS, tokenizer_class="Qwen2Tokenizer")
    print_tokenizer_notes(with_tokenizer(model=qwen), sys.stderr)
    assert f"tokenizer {qwen}: tokenizer_class Qwen2Tokenizer builds" in capsys.readouterr().err
    (note,) = tokenizer_notes(with_tokenizer(model=tmp_path / "not_here.json"))
    assert note.startswith("not compared with its export: ") and "not_here.json" in note


def test_other_ids_are_noticed(ours, tmp_path):
    write_tokenizer(ours, tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="gives other ids"):
        check_same_ids(ours, tmp_path, [PROBE])


def test_a_model_that_normalizes_is_refused(tmp_path):
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

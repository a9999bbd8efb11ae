"""The fast encoder gives the plain one's ids, or is not used."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.encode import load_encoder, open_encoder, plan_encoder
from equilibrium_mcore.corpus.fast_path import FRAGMENTS, compare_with_plain, reason_against
from equilibrium_mcore.data.tokenizer import load_tokenizer
from tests.support.byte_level import SPLITS, train_byte_level


def config_of(path: Path) -> TokenizerConfig:
    return TokenizerConfig(type="HuggingFaceTokenizer", model=path)


@pytest.fixture(scope="module", params=list(SPLITS))
def folder(request, tmp_path_factory, texts):
    return train_byte_level(tmp_path_factory.mktemp("bpe") / request.param, texts, request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, texts):
    return train_byte_level(tmp_path_factory.mktemp("bpe") / "gpt2", texts, "gpt2")


def changed(folder: Path, change) -> Path:
    """A copy of a tokenizer.json with one part changed."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    copy = folder / "changed" / "tokenizer.json"
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(json.dumps(content))
    return copy


def assert_equal(config: TokenizerConfig, texts: list[str]) -> None:
    fast, plain = (load_encoder(config, choice=choice) for choice in ("fast", "plain"))
    assert (fast.name, plain.name) == ("fast", "plain")
    ids, lengths = fast.encode(texts)
    expected_ids, expected_lengths = plain.encode(texts)
    ends, expected_ends = np.cumsum(lengths), np.cumsum(expected_lengths)
    for number, text in enumerate(texts):
        one = ids[ends[number] - lengths[number] : ends[number]]
        other = expected_ids[
            expected_ends[number] - expected_lengths[number] : expected_ends[number]
        ]
        assert one.tolist() == other.tolist(), ascii(text[:80])
    assert ids.dtype == expected_ids.dtype and lengths.dtype == expected_lengths.dtype == np.int64


def random_texts(number: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    limits = (0x7F, 0x24F, 0xD7FF, 0x10FFFF)
    texts = []
    for _ in range(number):
        points = [
            generator.choice(FRAGMENTS)
            if generator.random() < 0.4
            else chr(generator.randrange(generator.choice(limits)))
            for _ in range(generator.randrange(1, 80))
        ]
        texts.append("".join(p for p in points if not 0xD800 <= ord(p[0]) <= 0xDFFF))
    return texts


def test_equal_on_hard_text(folder, texts):
    hard = ["", " " * 40_000 + "x", "a" * 50_000, "\n" * 30_000, "=" * 30_000 + " \t" * 500]
    hard += ["<|endoftext|> in text <|im_start|>x<|im_start|", "I'M we'Ll \u017f's", "\x00\x7f"]
    assert_equal(config_of(folder), [*hard, *random_texts(300, 1), *texts])


@pytest.mark.slow
def test_equal_on_all_of_unicode(folder):
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
    rows = ["".join(points[i : i + 997]) for i in range(0, len(points), 997)]
    assert_equal(config_of(folder), [*rows, *random_texts(3000, 2)])


def test_equal_with_added_tokens(folder, texts):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["two words", "ab"])
    backend.add_special_tokens(
        [
            AddedToken("<L>", lstrip=True),
            AddedToken("<R>", rstrip=True),
            AddedToken("zz", single_word=True),
        ]
    )
    path = folder / "added" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    backend.save(str(path))
    hard = "x two words y ab abc  <L>  a <R>  b zz zzz azz zz\n<L><R>\u00a0<L>"
    assert_equal(config_of(path), [hard, hard * 50, *texts[:20]])


def test_values_and_bytes(gpt2):
    encoder = load_encoder(config_of(gpt2), choice="fast")
    tokenizer = load_tokenizer(config_of(gpt2))
    texts = ["one", "", "zwölf 12"]
    ids, lengths = encoder.encode(texts)
    assert ids.tolist() == sum((tokenizer.encode(text) for text in texts), [])
    assert lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]
    assert ids.dtype == encoder.dtype == np.uint16
    assert encoder.encode([text.encode() for text in texts])[0].tolist() == ids.tolist()
    assert (encoder.eod, encoder.vocab_size) == (tokenizer.eod, tokenizer.vocab_size)
    assert encoder.fingerprint == tokenizer.fingerprint
    empty, none = encoder.encode([])
    assert empty.size == none.size == 0


@pytest.mark.parametrize("choice", ["fast", "plain"])
def test_half_a_surrogate_is_an_error(gpt2, choice):
    encoder = load_encoder(config_of(gpt2), choice=choice)
    with pytest.raises(UnicodeError):
        encoder.encode(["fine", "half \ud83d"])
    with pytest.raises(UnicodeError):
        encoder.encode([b"\xff"])


def test_documents_are_not_cut(gpt2):
    def truncate(content):
        content["truncation"] = {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip

    config = config_of(changed(gpt2, truncate))
    assert_equal(config, ["a text of more than four tokens"])
    assert load_encoder(config).encode(["a text of more than four tokens"])[0].size > 4


@pytest.mark.parametrize("threads", [1, 2])
def test_sentencepiece_takes_the_plain_way(tokenizer, tokenizer_config, texts, threads, capsys):
    encoder = load_encoder(tokenizer_config, threads=threads)
    assert encoder.name == "plain" and capsys.readouterr().err == ""
    hard = [*texts[:50], "", "\u2581 as itself"]
    ids, lengths = encoder.encode(hard)
    assert ids.tolist() == sum((tokenizer.encode(text) for text in hard), [])
    assert lengths.sum() == ids.size and lengths.size == len(hard)
    with pytest.raises(ValueError, match=r"reads a tokenizer\.json"):
        load_encoder(tokenizer_config, choice="fast")


REFUSED = {
    "dropout": lambda c: c["model"].update(dropout=0.1),
    "Lowercase": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "NFKC": lambda c: c.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}
    ),
    "space in front": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    "Whitespace": lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
    "not byte-level": lambda c: c.update(pre_tokenizer=None),
    "end_of_word_suffix": lambda c: c["model"].update(end_of_word_suffix="</w>"),
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_what_was_not_compared_takes_the_plain_way(gpt2, words, capsys):
    path = changed(gpt2, REFUSED[words])
    encoder = load_encoder(config_of(path))
    assert encoder.name == "plain"
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and str(path) in shown and words in shown
    with pytest.raises(ValueError, match=r"--encoder auto"):
        load_encoder(config_of(path), choice="fast")


def test_a_difference_is_found(gpt2):
    """Another tokenizer in the fast library's place: the probe must notice."""
    tokenizer = load_tokenizer(config_of(gpt2))

    def other(_):
        from fastokens._native import Tokenizer as Backend

        def fewer_merges(content):
            content["model"]["merges"] = content["model"]["merges"][:-1]

        return Backend.from_file(str(changed(gpt2, fewer_merges)))

    assert reason_against(tokenizer) is None
    # The last merge of a tiny vocabulary may be a word that no probe holds: put it in.
    merges = json.loads((gpt2 / "tokenizer.json").read_text())["model"]["merges"]
    last = "".join(merges[-1]).replace("\u0120", " ").replace("\u010a", "\n")
    assert "differs from tokenizers" in str(compare_with_plain(tokenizer, other, [last]))


def test_a_library_that_fails_takes_the_plain_way(gpt2):
    def broken(_):
        raise RuntimeError("no such feature")

    tokenizer = load_tokenizer(config_of(gpt2))
    assert "does not read it (no such feature)" in str(compare_with_plain(tokenizer, broken))


def test_a_plan_opens_in_any_process(gpt2):
    plan = plan_encoder(config_of(gpt2))
    assert plan.fast and plan.reason is None
    assert open_encoder(plan).encode(["one"])[0].size
    slow = plan_encoder(config_of(gpt2), choice="plain")
    assert not slow.fast and open_encoder(slow).name == "plain"
    with pytest.raises(ValueError, match="0 threads"):
        open_encoder(plan, threads=0)


def test_a_text_that_the_library_refuses_goes_the_plain_way(gpt2, capsys):
    encoder = load_encoder(config_of(gpt2), choice="fast")
    expected = encoder.encode(["one", "two"])

    class Refusing:
        def encode_batch_flat(self, _):
            raise RuntimeError("match limit exceeded")

    encoder.backend = Refusing()
    for _ in range(2):
        ids, lengths = encoder.encode(["one", "two"])
        assert (ids.tolist(), lengths.tolist()) == tuple(part.tolist() for part in expected)
    assert capsys.readouterr().err.count("match limit exceeded") == 1

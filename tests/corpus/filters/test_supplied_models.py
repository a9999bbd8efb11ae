"""Models of the user's, in the formats of fastText and KenLM. Skips where those are missing."""

from __future__ import annotations

import pytest

from equilibrium_mcore.config.errors import ConfigError

ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<unk>
0\t<s>\t-0.3
-1.0\t</s>
-0.7\tthe\t-0.2
-0.9\tdog\t-0.2

\\2-grams:
-0.2\t<s> the
-0.3\tthe dog
-0.1\tdog </s>

\\end\\
"""


def test_kenlm(tmp_path, chain, reason):
    pytest.importorskip("kenlm")
    path = tmp_path / "model.arpa"
    path.write_text(ARPA)
    perplexity = chain(type="perplexity", model=str(path), max_perplexity=5.0).filters[0].perplexity
    assert perplexity("the dog") == pytest.approx(10 ** (0.6 / 3), rel=1e-5)
    assert perplexity("the dog\nthe  dog") == pytest.approx(perplexity("the dog"))
    settings = dict(type="perplexity", model=str(path), max_perplexity=5.0)
    assert reason("the dog", **settings) is None
    assert reason("zebra cat", **settings) == "perplexity above 5"
    path.write_text("no model")
    with pytest.raises(ConfigError, match="cannot be read by KenLM"):
        chain(type="perplexity", model=str(path), max_perplexity=6.0)


def test_fasttext(tmp_path, chain, reason):
    fasttext = pytest.importorskip("fasttext")
    lines = {"en": "the house of the man and the dog", "de": "das haus und der hund im garten"}
    source = tmp_path / "lines.txt"
    source.write_text("".join(f"__label__{k} {v}\n" for k, v in lines.items()) * 200)
    path = tmp_path / "model.bin"
    model = fasttext.train_supervised(str(source), epoch=20, lr=0.3, dim=8, thread=1, verbose=0)
    model.save_model(str(path))
    language = dict(type="language", library="fasttext", model=str(path), languages=["de"])
    assert reason("der hund\nund das haus", **language) is None
    assert reason("the dog and the house", **language) == "language en"
    quality = dict(type="educational", model=str(path), positive_label="__label__en")
    assert reason("the dog and the house", **quality) is None
    assert reason("der hund und das haus", **quality) == "score below 0.5"
    with pytest.raises(ConfigError, match="is no label of .*; it has de, en"):
        chain(type="educational", model=str(path))
    path.write_text("no model")
    with pytest.raises(ConfigError, match="is not a fastText model"):
        chain(type="language", library="fasttext", model=str(path), languages=["en"])

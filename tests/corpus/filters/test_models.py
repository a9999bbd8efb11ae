"""Filters with a model: trained on text that ships with Python, measured on the rest of it."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.corpus.filters.character_ngrams import (
    CHARACTERS,
    CharacterNgrams,
    train_character_ngrams,
)
from equilibrium_mcore.corpus.filters.linear_classifier import (
    LinearClassifier,
    features,
    train_linear_classifier,
)
from equilibrium_mcore.corpus.filters.train_classifier import train_quality_classifier
from equilibrium_mcore.corpus.filters.train_perplexity import train_perplexity_model
from tests.corpus.filters.conftest import PROSE


@pytest.fixture(scope="module")
def classifier(stdlib_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "prose.safetensors"
    summary = train_quality_classifier(
        positive=[stdlib_files["prose"]],
        negative=[stdlib_files["code"]],
        output=path,
        bits=14,
        held_out_share=0.3,
    )
    return summary


@pytest.fixture(scope="module")
def perplexity(stdlib_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("perplexity") / "prose.safetensors"
    return train_perplexity_model(inputs=[stdlib_files["prose"]], output=path, order=4)


# ------------------------------------------------------------------------------ perplexity


def by_definition(texts: list[str], text: str, order: int) -> float:
    """Witten and Bell's formula, with Python's dictionaries."""

    def grams(k):
        return [t[i : i + k] for t in texts for i in range(len(t) - k + 1)]

    def probability(past: str, character: str) -> float:
        lower = probability(past[1:], character) if past else 1 / CHARACTERS
        followers = [gram[-1] for gram in grams(len(past) + 1) if gram[:-1] == past]
        if not followers:
            return lower
        types = len(set(followers))
        return (followers.count(character) + types * lower) / (len(followers) + types)

    logs = [
        math.log(probability(text[max(0, i - order + 1) : i], text[i])) for i in range(len(text))
    ]
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_perplexity_is_the_formulas(order):
    texts = ["the cat sat on the mat", "a hat, ü", "", "x"]
    model = train_character_ngrams(texts, order=order)
    for text in ("the cat", "that", "q", "übq the", "x"):
        assert model.perplexity(text) == pytest.approx(by_definition(texts, text, order))
    assert model.perplexity("") == math.inf


def test_probabilities_sum_to_one():
    model = train_character_ngrams(["abcab", "bca"], order=3)
    seen = {c: np.exp(model.log_probabilities(f"ab{c}")[-1]) for c in "abc"}
    unseen = np.exp(model.log_probabilities("abz")[-1])
    assert sum(seen.values()) + (CHARACTERS - 3) * unseen == pytest.approx(1)


def test_batches_count_as_the_whole(monkeypatch, stdlib_texts):
    texts = stdlib_texts["prose"][:20]
    whole = train_character_ngrams(texts, order=3)
    monkeypatch.setattr("equilibrium_mcore.corpus.filters.character_ngrams.BATCH_CHARACTERS", 5000)
    parts = train_character_ngrams(texts, order=3)
    for a, b in zip(whole.levels, parts.levels, strict=True):
        for name in ("grams", "counts", "pasts", "totals", "types"):
            assert np.array_equal(getattr(a, name), getattr(b, name))


def test_pieces_of_a_document_are_judged_as_the_whole(monkeypatch):
    model = train_character_ngrams([PROSE], order=5)
    whole = model.perplexity(PROSE[::-1] + PROSE)
    for size in (1, 3, 4, 50, 10_000):
        monkeypatch.setattr(
            "equilibrium_mcore.corpus.filters.character_ngrams.PIECE_CHARACTERS", size
        )
        assert model.perplexity(PROSE[::-1] + PROSE) == pytest.approx(whole, rel=1e-12)


def test_perplexity_tells_prose_from_noise(perplexity, reason):
    generator = random.Random(0)
    noise = "".join(generator.sample(PROSE, len(PROSE)))
    limit = 1.5 * perplexity.quantiles[0.95]
    settings = dict(type="perplexity", model=str(perplexity.path), max_perplexity=limit)
    assert reason(PROSE, **settings) is None
    assert reason(noise, **settings) == f"perplexity above {limit:g}"
    assert reason(PROSE, **settings | {"min_perplexity": 1.0}) is None
    repeated = "of the " * 200
    floor = dict(type="perplexity", model=str(perplexity.path), min_perplexity=3.5)
    assert reason(repeated, **floor) == "perplexity below 3.5"
    assert reason(PROSE, **floor) is None


def test_a_saved_model_is_the_same_model(perplexity, stdlib_texts):
    held = CharacterNgrams.load(perplexity.path)
    assert len(held.levels) == 4 and perplexity.held_out >= 2
    assert list(perplexity.quantiles.values()) == sorted(perplexity.quantiles.values())
    values = [held.perplexity(text) for text in stdlib_texts["prose"][19::20]]
    assert np.quantile(values, 0.5) == pytest.approx(perplexity.quantiles[0.5])


# ----------------------------------------------------------------------------- educational


def test_held_out_documents_are_told_apart(classifier):
    assert classifier.held_out >= 20
    assert classifier.accuracy >= 0.9 > classifier.baseline + 0.1
    positives, negatives = classifier.kept[0.5]
    assert positives >= 0.85 and negatives <= 0.15


def test_what_was_measured_is_what_the_file_does(classifier, stdlib_texts, reason):
    settings = dict(type="educational", model=str(classifier.path))
    assert reason(PROSE, **settings) is None
    code = "def f(self, x):\n    return [self._a[i] for i in x if i is not None]\n" * 3
    assert reason(code, **settings) == "score below 0.5"
    assert reason(code, **settings, min_score=0.0) is None
    model = LinearClassifier.load(classifier.path)
    assert model.weights.dtype == np.float32 and model.bits == 14
    low, high = (np.mean([model.score(t) for t in stdlib_texts[k]]) for k in ("code", "prose"))
    assert low < 0.3 < 0.7 < high


def test_labels_at_random_cannot_be_learnt(tmp_path, stdlib_texts):
    """The measurement is honest: held-out documents are not trained on."""
    texts = list(stdlib_texts["prose"])
    random.Random(0).shuffle(texts)
    paths = []
    for name, part in (("a", texts[::2]), ("b", texts[1::2])):
        paths.append(tmp_path / f"{name}.jsonl")
        # Each text twice: a copy must not be on both sides.
        paths[-1].write_text("".join(json.dumps({"text": t}) + "\n" for t in [*part, *part]))
    done = train_quality_classifier(
        positive=paths[:1],
        negative=paths[1:],
        output=tmp_path / "m.safetensors",
        bits=12,
        held_out_share=0.4,
    )
    assert done.positives == len(texts[::2])
    assert 0.25 < done.accuracy < 0.75


def test_training_finds_the_minimum():
    """The gradient of the penalized loss is zero, and the classes weigh the same."""
    texts = [f"good words number {n}" for n in range(6)] + ["bad words", "bad text"]
    labels = [True] * 6 + [False] * 2
    penalty = 1e-2
    model = train_linear_classifier(texts, labels, bits=8, penalty=penalty)
    gradient = 2 * penalty * model.weights.astype(np.float64)
    bias_gradient = 0.0
    for text, label in zip(texts, labels, strict=True):
        places, values = features(text, 8)
        error = (model.score(text) - label) * (0.5 / 6 if label else 0.5 / 2)
        gradient[places] += error * values
        bias_gradient += error
    assert np.abs(gradient).max() < 1e-4 and abs(bias_gradient) < 1e-4
    assert np.abs(model.weights).max() > 0.1


def test_features_have_length_one_and_no_order_beyond_pairs():
    for text in ("a b c", "a a a b", "日本語", "don't 12"):
        places, values = features(text, 18)
        assert np.linalg.norm(values) == pytest.approx(1)
        assert np.all(np.diff(places) > 0)
    assert features("", 18)[0].size == 0
    a, b = (set(features(" ".join(words), 20)[0]) for words in itertools.permutations("xy"))
    assert len(a & b) == 2 and len(a | b) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "m.bin"}, "must end in .safetensors"),
        ({"held_out_share": 1.0}, "between 0 and 1"),
        ({"bits": 40}, "must be 8 to 26"),
        ({"negative": "few"}, "at least 10 are needed"),
        ({"negative": "same"}, "positive and negative at once"),
        ({"text_field": "body"}, "no text under body"),
        ({"negative": "gone"}, "no such file"),
    ],
)
def test_what_cannot_be_trained(tmp_path, stdlib_files, change, message):
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a"}\n' * 20)
    files = {"few": few, "same": stdlib_files["prose"], "gone": tmp_path / "gone.jsonl"}
    arguments = dict(
        positive=[stdlib_files["prose"]],
        negative=[stdlib_files["code"]],
        output=tmp_path / "m.safetensors",
    )
    for key, value in change.items():
        if key == "negative":
            value = [files[value]]
        arguments[key] = tmp_path / value if key == "output" else value
    with pytest.raises((ValueError, OSError), match=message):
        train_quality_classifier(**arguments)
    assert not list(tmp_path.glob("*m.*"))


# ------------------------------------------------------------------- files of another kind


@pytest.mark.parametrize("kind", ["perplexity", "educational"])
def test_other_files_are_refused(kind, chain, tmp_path, classifier, perplexity):
    other = {"perplexity": classifier.path, "educational": perplexity.path}[kind]
    limit = {"max_perplexity": 5.0} if kind == "perplexity" else {}
    half = tmp_path / "half.safetensors"
    half.write_bytes(other.read_bytes()[:100])
    cases = {
        tmp_path / "gone.safetensors": "does not exist; train one with python tools/train_",
        other: "is no model that `python tools/train_",
        half: "is no model that `python tools/train_",
        tmp_path / "model.pkl": "does not exist",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            chain(type=kind, model=str(path), **limit)
    pickled = tmp_path / "model.pkl"
    pickled.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"ends in '\.pkl': must be \.safetensors"):
        chain(type=kind, model=str(pickled), **limit)

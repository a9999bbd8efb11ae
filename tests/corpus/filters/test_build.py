"""From settings to a chain: what is missing is told at once, and before any work."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.filters import FILTER_CLASSES, parse_filters
from equilibrium_mcore.corpus.filters.base import DocumentFilter, FilterChain, FilterError
from equilibrium_mcore.corpus.filters.build import _BUILDERS, build_filters
from equilibrium_mcore.corpus.filters.character_ngrams import train_character_ngrams
from equilibrium_mcore.corpus.filters.linear_classifier import LinearClassifier
from tests.corpus.filters.conftest import PROSE


def test_every_type_has_a_builder():
    assert _BUILDERS.keys() == FILTER_CLASSES.keys()


def test_the_roadmaps_filters(chain, kept):
    """The list that users write, in their order."""
    filters = chain(
        {"type": "language", "languages": ["en"]},
        {"type": "quality", "min_length": 100, "max_length": 100000},
        {"type": "deduplication", "method": "exact"},
        {"type": "pii_removal", "enabled": True},
    )
    names = [part.name for part in filters.filters]
    assert names == ["language", "quality", "deduplication", "pii_removal"]
    assert filters.has_corpus_filters
    german = "Der Fluss entspringt in den Hügeln nördlich der Stadt und fließt nach Westen. " * 3
    assert kept(filters, [PROSE, german, "The end of it all.", PROSE, PROSE + "x"]) == [0, 4]
    outcome = filters.process(PROSE + "Write to jane@mail.org now.", {})
    assert outcome.text.endswith("Write to email@example.com now.")
    assert len(outcome.signatures) == 1 and outcome.signatures[0].dtype == np.uint64


def test_filters_that_are_not_enabled_are_left_out(chain):
    off = dict(type="perplexity", model="nowhere.safetensors", max_perplexity=1.0, enabled=False)
    filters = chain(off, dict(type="length", min_length=2, enabled=False))
    assert filters.filters == () and not filters.has_corpus_filters
    assert filters.process("", {}).dropped is None


def test_everything_missing_is_told_at_once(tmp_path):
    configs = parse_filters(
        [
            {"type": "perplexity", "model": "no.safetensors", "max_perplexity": 9.0},
            {"type": "length", "min_length": 3},
            {"type": "length", "unit": "tokens", "min_length": 3},
            {"type": "language", "languages": ["en", "klingon"]},
            {"type": "gopher_quality", "word_tokenizer": "klingon"},
            {"type": "educational", "model": "no.bin"},
        ]
    )
    with pytest.raises(ConfigError) as caught:
        build_filters(configs)
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == [
        f"filters.{n}" for n in (0, 2, 3, 4, 5)
    ]
    assert "tools/train_perplexity_model.py" in problems[0]
    assert "needs a tokenizer" in problems[1]
    assert "['klingon']: not known to py3langid; it knows" in problems[2]
    assert "klingon" in problems[3]


BLOCKED = """
import sys
blocked = {"datatrove", "py3langid", "fasttext", "kenlm", "torch", "spacy"}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
from equilibrium_mcore.config.filters import parse_filters
from equilibrium_mcore.corpus.filters.build import build_filters
fine = [
    {"type": "length", "min_length": 3}, {"type": "quality", "min_length": 3},
    {"type": "pii_removal"}, {"type": "deduplication"},
]
assert len(build_filters(parse_filters(fine)).filters) == 4
open("m.bin", "w").close()
open("r.jsonl", "w").write('{"text": "one two three four five six seven eight nine"}')
try:
    build_filters(parse_filters([
        {"type": "language", "languages": ["en"]},
        {"type": "quality", "rules": ["fineweb"]},
        {"type": "c4"},
        {"type": "deduplication", "method": "minhash"},
        {"type": "deduplication", "method": "simhash"},
        {"type": "deduplication", "normalize": "simplified"},
        {"type": "decontamination", "references": ["r.jsonl"]},
        {"type": "perplexity", "model": "m.bin", "max_perplexity": 3.0},
        {"type": "educational", "model": "m.bin"},
        {"type": "language", "languages": ["en"], "library": "fasttext", "model": "m.bin"},
    ]))
except ValueError as error:
    print("\\n".join(error.problems))
"""


def test_missing_libraries_are_told_with_the_command(tmp_path, repository):
    command = [sys.executable, "-c", BLOCKED]
    environment = {"PYTHONPATH": str(repository), "PATH": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    wanted = [("py3langid", "'.[filters]'"), *[("datatrove", "'.[filters]'")] * 6]
    wanted += [("kenlm", "pip install kenlm"), *[("fasttext", "pip install fasttext-wheel")] * 2]
    assert len(lines) == len(wanted)
    for number, (line, (library, install)) in enumerate(zip(lines, wanted, strict=True)):
        assert line.startswith(f"filters.{number}: filter "), line
        assert f"needs the library {library}," in line and install in line


def test_datatroves_own_tokenizers_are_asked_for_before_any_document(chain):
    pytest.importorskip("datatrove")
    try:
        import spacy  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="spacy"):
            chain(type="gopher_quality", word_tokenizer="eng")


ODD = [
    "",
    " ",
    "\n\n",
    "\x00",
    ".",
    "...",
    "\ufeff",
    "e\u0301" * 9,
    "日本語。" * 30,
    "\U0001f600 " * 60,
    "a" * 5000,
    "word " * 600,
    "half \ud83d of a pair, \udc00 and more words behind it",
    "\r\n- \r\n",
    "1 " * 300,
    "\u2028\u2029\x85\x0b",
    "[[[" * 99,
    "\u202e right to left \u0627\u0644" * 20,
]


@pytest.mark.parametrize(
    "settings",
    [
        *[{"type": kind} for kind in ("gopher_quality", "gopher_repetition", "c4", "fineweb")],
        {"type": "gopher_quality", "min_words": 0, "min_mean_word_length": 0, "min_stop_words": 0},
        {"type": "c4", "min_sentences": 0, "require_terminal_punctuation": False},
        {"type": "fineweb", "min_terminal_punctuation_lines": 0.0, "max_short_lines": 1.0},
        {"type": "language", "languages": ["en"], "min_confidence": 0.0},
        {"type": "pii_removal"},
        *[{"type": "deduplication", "method": m} for m in ("exact", "minhash", "simhash")],
        {"type": "deduplication", "normalize": "simplified"},
        {"type": "decontamination", "references": ["REFERENCES"]},
        {"type": "perplexity", "model": "PERPLEXITY", "max_perplexity": 9.0},
        {"type": "educational", "model": "EDUCATIONAL"},
    ],
    ids=lambda settings: "-".join(map(str, list(settings.values())[:2])),
)
def test_no_text_stops_a_filter(settings, chain, tmp_path):
    """Whatever a corpus holds, a run goes on: each text stays or is dropped with a reason."""
    files = {
        name: tmp_path / f"{name}.safetensors"
        for name in ("REFERENCES", "PERPLEXITY", "EDUCATIONAL")
    }
    files["REFERENCES"].write_text('{"text": "one two three four five six seven eight nine"}')
    train_character_ngrams([PROSE], order=3).save(files["PERPLEXITY"])
    LinearClassifier(np.ones(256, np.float32), 0.0).save(files["EDUCATIONAL"])
    for key, value in settings.items():
        name = value[0] if isinstance(value, list) else value
        if name in files:
            settings = settings | {
                key: [str(files[name])] if key == "references" else str(files[name])
            }
    filters = chain(**settings)
    for outcome in filters.resolve([filters.process(text, {}) for text in ODD]):
        assert isinstance(outcome.text, str)
        assert outcome.dropped is None or 0 < len(outcome.dropped.reason) < 60


def test_a_filter_that_fails_names_the_document():
    class Broken(DocumentFilter):
        name = "broken"

        def apply(self, text, fields):
            return text[1_000_000]

    with pytest.raises(FilterError, match="filter broken failed on a document of 5 .*'hello'"):
        FilterChain([Broken()]).process("hello", {})

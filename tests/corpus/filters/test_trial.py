"""tools/try_filter.py and the trainers, as commands."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest

from equilibrium_mcore.config.filters import parse_filters
from equilibrium_mcore.corpus.filters.trial import draw_records, try_filters
from equilibrium_mcore.corpus.filters.trial_command import report_trial
from tests.corpus.filters.conftest import PROSE

TEXTS = ["short", PROSE, PROSE, "x" * 3000, PROSE + "Ask jane@mail.org now.", "tiny"]


@pytest.fixture
def web(tmp_path, write_jsonl):
    return write_jsonl(tmp_path / "web.jsonl", TEXTS)


def command(repository, *words):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_report_as_a_table(repository, web):
    done = command(
        repository, "tools/try_filter.py", web, "--examples", 1,
        "--filter", "type=length,min_length=6,max_length=2000",
        "--filter", "type=deduplication", "--filter", "type=pii_removal,kinds=[email, phone]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{web}: 6 of 6 documents tried; 2 kept (33.3%), with ")
    rows = [line.rsplit(maxsplit=7) for line in lines[3:6]]
    assert [row[0] for row in rows] == [
        "length min_length=6, max_length=2000",
        "deduplication",
        'pii_removal kinds=["email", "phone"]',
    ]
    # reached, kept, dropped, share, changed, characters
    assert [row[1:7] for row in rows] == [
        ["6", "3", "3", "50.0%", "0", "0"],
        ["3", "2", "1", "33.3%", "0", "0"],
        ["2", "2", "0", "0.0%", "1", "+4"],
    ]
    assert all(float(row[7]) >= 0 for row in rows)
    text = done.stdout
    assert "length: fewer than 6 characters: 2\n    short\n" in text
    assert "length: more than 2000 characters: 1\n    " + "x" * 100 + "\n" in text
    assert "deduplication: same text as an earlier document: 1\n    The river rises" in text
    assert text.index("fewer than") < text.index("more than")


def test_report_as_json_and_markdown(tmp_path, web):
    filters = tmp_path / "filters.yaml"
    filters.write_text("filters:\n  - {type: length, min_length: 6}\n")
    words = ["type=c4"]
    found = json.loads(
        report_trial(web, filter_arguments=words, filters=filters, output_format="json")
    )
    assert (found["sampled"], found["documents_in_file"], found["kept"]) == (6, 6, 3)
    length, c4 = found["filters"]
    assert length["type"] == "length" and length["settings"] == {"min_length": 6}
    assert length["reasons"] == {
        "fewer than 6 characters": {"documents": 2, "examples": ["short", "tiny"]}
    }
    assert c4["reasons"]["too_few_sentences"]["documents"] == 1
    assert c4["characters_removed"] == 2 and c4["changed"] == 2  # the newline at each end
    markdown = report_trial(
        web, filter_arguments=["type=length,min_length=6"], output_format="markdown"
    )
    assert "| length min_length=6 | 6 | 4 | 2 | 33.3% | 0 | 0 |" in markdown
    assert "| length | fewer than 6 characters | 2 | short |" in markdown


def test_markdown_is_not_broken_by_a_document(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["a | b <b> \n c"])
    markdown = report_trial(
        path, filter_arguments=["type=length,min_length=99"], output_format="markdown"
    )
    assert markdown.splitlines()[-1].endswith("| 1 | a \\| b &lt;b> c |")


def test_a_sample_is_even_seeded_and_in_reading_order(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "many.jsonl", [str(n) for n in range(300)])
    total, records = draw_records(path, 60, seed=1, text_field="text")
    numbers = [int(record["text"]) for record in records]
    assert total == 300 and len(set(numbers)) == 60 and numbers == sorted(numbers)
    assert 10 <= sum(number < 100 for number in numbers) <= 30
    again = draw_records(path, 60, seed=1, text_field="text")[1]
    other = draw_records(path, 60, seed=2, text_field="text")[1]
    assert again == records != other
    assert len(draw_records(path, 0, seed=1, text_field="text")[1]) == 300


def test_a_sample_says_that_it_sees_fewer_duplicates(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "many.jsonl", ["a", "b", "c"])
    configs = parse_filters([{"type": "deduplication"}])
    assert try_filters(path, configs, sample=2).looks_across_a_sample
    assert not try_filters(path, configs, sample=0).looks_across_a_sample
    words = ["type=deduplication"]
    assert "--sample 0" in report_trial(path, filter_arguments=words, sample=2)
    assert "--sample 0" not in report_trial(path, filter_arguments=words, sample=3)


def test_gzip_other_field_and_tokens(tmp_path, tokenizer_config):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.write('{"body": "def encode"}\n\n{"body": "x"}\n')
    found = json.loads(
        report_trial(
            path,
            filter_arguments=["type=length,unit=tokens,min_length=2"],
            tokenizer_model=tokenizer_config.model,
            text_field="body",
            output_format="json",
        )
    )
    assert found["kept"] == 1
    assert list(found["filters"][0]["reasons"]) == ["fewer than 2 tokens"]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([], {}, "no filter is given"),
        (["length"], {}, "'length' is no key=value"),
        (["type=lenght"], {}, "did you mean 'length'?"),
        (["type=length,min_length=a"], {}, "must be a whole number"),
        (["type=length,min_length=1"], {"sample": -1}, "--sample -1"),
        (["type=length,min_length=1"], {"text_field": "body"}, "line 1: no text under 'body'"),
        (["type=perplexity,model=no.bin,max_perplexity=1"], {}, "no.bin does not exist"),
        (["type=length,unit=tokens,min_length=1"], {}, "needs a tokenizer"),
        ([], {"filters": "configs/data/quickstart.yaml"}, "filters: must be a list of filters"),
    ],
)
def test_what_cannot_be_tried(repository, web, words, options, message):
    if "filters" in options:
        options = {"filters": repository / options["filters"]}
    with pytest.raises((ValueError, OSError)) as caught:
        report_trial(web, filter_arguments=words, **options)
    assert message in str(caught.value)


def test_the_command_reports_errors_in_one_line_and_starts_light(repository, web):
    tool = "tools/try_filter.py"
    done = command(
        repository, "-X", "importtime", tool, web.with_name("gone.jsonl"), "--filter", "type=c4"
    )
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert "gone.jsonl: no such file; give a JSONL file" in done.stderr.splitlines()[-1]
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "datatrove.data" in imported
    assert not imported & {"torch", "transformers", "megatron.core", "spacy", "nltk"}


def test_trainers_as_commands(repository, tmp_path, stdlib_files):
    model = tmp_path / "words.safetensors"
    arguments = ["--input", stdlib_files["prose"], "--output", model, "--order", 3]
    done = command(repository, "tools/train_perplexity_model.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{model}: " in done.stdout and "held-out documents: perplexity <= " in done.stdout
    arguments[3], arguments[5] = tmp_path / "others.safetensors", 99
    done = command(repository, "tools/train_perplexity_model.py", *arguments)
    assert done.returncode == 1 and "order 99: must be 1 to 8" in done.stderr
    sides = ["--positive", stdlib_files["prose"], "--negative", stdlib_files["code"]]
    scores = tmp_path / "prose.bin"
    done = command(repository, "tools/train_quality_classifier.py", *sides, "--output", scores)
    assert done.returncode == 1 and "prose.bin: must end in .safetensors" in done.stderr

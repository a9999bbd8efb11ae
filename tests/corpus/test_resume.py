"""A run that was stopped resumes, and its bytes are those of one that was not."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys

import pytest

from equilibrium_mcore.corpus.preprocess import preprocess
from equilibrium_mcore.corpus.preprocess_run import BadLinesError, PreprocessRun
from equilibrium_mcore.data.indexed_files import read_manifest
from tests.support.byte_level import train_byte_level
from tests.support.tool_faults import PATIENCE_SECONDS, environment

ENDINGS = ("bin", "idx", "json")
# Kills itself, with its workers, after so many ranges; every range has its journal.
CHILD = """
import os, signal, sys
from pathlib import Path
from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.preprocess import preprocess
from equilibrium_mcore.corpus.preprocess_run import PreprocessRun
take, left = PreprocessRun._take, int(sys.argv[4])
def killed(self, *arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    take(self, *arguments)
PreprocessRun._take = killed
preprocess(
    inputs=[Path(path) for path in sys.argv[5:]],
    output_prefix=Path(sys.argv[1]),
    tokenizer=TokenizerConfig(type="HuggingFaceTokenizer", model=Path(sys.argv[2])),
    append_eod=True, workers=int(sys.argv[3]), range_bytes=50_000, journal_seconds=0.0,
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    return train_byte_level(tmp_path_factory.mktemp("bpe") / "gpt2", texts, "gpt2")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, texts):
    """A plain file, a large and a small compressed one, and small plain ones."""
    where = tmp_path_factory.mktemp("sources")
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    generator = random.Random(3)
    contents = {
        "a.jsonl": lines * 5,
        "b.jsonl.gz": generator.choices(lines, k=3000),
        "c.jsonl.gz": lines[:5],
        "d.jsonl": lines[:9],
        "e.jsonl": lines * 2,
    }
    for name, chosen in contents.items():
        data = b"".join(chosen)
        (where / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return sorted(where.iterdir())


@pytest.fixture
def run(tmp_path, folder, sources, tokenizer_config):
    config = tokenizer_config.model_copy(update={"type": "HuggingFaceTokenizer", "model": folder})

    def call(output="set", **changes):
        arguments = {
            "inputs": sources,
            "output_prefix": tmp_path / output,
            "tokenizer": config,
            "append_eod": True,
            "workers": 1,
            "range_bytes": 20_000,
            "journal_seconds": 0.0,
            **changes,
        }
        return preprocess(**arguments).prefixes["text"]

    return call


def stop_behind(monkeypatch, ranges: int) -> None:
    """Ctrl-C after so many ranges."""
    take = PreprocessRun._take
    count = 0

    def counting(self, *arguments):
        nonlocal count
        take(self, *arguments)
        count += 1
        if count == ranges:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PreprocessRun, "_take", counting)


def files_of(prefix) -> list[bytes]:
    return [prefix.with_name(f"{prefix.name}.{ending}").read_bytes() for ending in ENDINGS]


@pytest.mark.parametrize(
    "stops", [(1, 40, 75), pytest.param(range(1, 90, 4), marks=pytest.mark.slow)]
)
def test_goes_on_from_any_range(tmp_path, run, monkeypatch, capsys, stops):
    expected = files_of(run("whole", journal_seconds=60.0))
    for ranges in stops:
        with monkeypatch.context() as patch:
            stop_behind(patch, ranges)
            with pytest.raises(SystemExit) as stopped:
                run(workers=1 + ranges % 2, journal_seconds=60.0)
        assert stopped.value.code == 130
        assert not (tmp_path / "set_text_document.idx").exists()
        capsys.readouterr()
        assert files_of(run(workers=2 - ranges % 2, journal_seconds=60.0)) == expected
        assert "resuming at" in capsys.readouterr().err
        left = [path.name for path in tmp_path.iterdir() if "partial" in path.name]
        assert left == []
        for ending in ENDINGS:
            (tmp_path / f"set_text_document.{ending}").unlink()


def test_killed_again_and_again(tmp_path, run, folder, sources):
    expected = files_of(run("whole", journal_seconds=60.0))
    for after in (1, 9, 25, 0, 0):  # 0: never; the last one finds what the one before made
        words = [tmp_path / "set", folder, "2", after, *sources]
        process = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, words)],
            env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
        assert process.returncode == (-signal.SIGKILL if after else 0), process.stderr
        assert (tmp_path / "set_text_document.idx").exists() == (not after)
    assert "there already, made of the same" in process.stderr
    assert files_of(tmp_path / "set_text_document") == expected
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_says_what_changed(tmp_path, run, sources, tokenizer_config, monkeypatch):
    with monkeypatch.context() as patch:
        stop_behind(patch, 3)
        with pytest.raises(SystemExit):
            run()
    touched = tmp_path / sources[0].name
    touched.write_bytes(sources[0].read_bytes())
    for changes, words in (
        ({"append_eod": False}, "--append-eod was True and is False"),
        ({"tokenizer": tokenizer_config}, "tokenizer's sha256 was"),
        ({"inputs": sources[:-1]}, f"{sources[-1]} is not an input now"),
        ({"inputs": [touched, *sources[1:]]}, f"{sources[0]} is not an input now"),
        ({"partition": 1, "partitions": 2}, "partition was '1 of 1' and is '1 of 2'"),
    ):
        with pytest.raises(ValueError, match=r"--restart") as refused:
            run(**changes)
        assert words in str(refused.value)
    before = files_of(run("whole"))
    assert files_of(run(restart=True)) == before


def test_a_bad_line_late_in_a_run_does_not_lose_it(tmp_path, run, sources, capsys):
    late = tmp_path / "late.jsonl"
    late.write_bytes(sources[0].read_bytes() + b'{"text": 1}\n' + sources[3].read_bytes())
    with pytest.raises(BadLinesError, match="the run resumes from there"):
        run(inputs=[late])
    assert not (tmp_path / "set_text_document.idx").exists()
    capsys.readouterr()
    prefix = run(inputs=[late], skip_bad_lines=True)
    assert "resuming at" in capsys.readouterr().err
    assert files_of(prefix) == files_of(run("whole", inputs=[late], skip_bad_lines=True))
    assert read_manifest(prefix).skipped_lines == 1


def test_a_journal_whose_files_are_gone_is_no_reason_to_stop(tmp_path, run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_behind(patch, 3)
        with pytest.raises(SystemExit):
            run()
    (tmp_path / "set_text_document.bin.partial").unlink()
    assert files_of(run()) == files_of(run("whole"))
    journal = tmp_path / "other_text_document.journal.partial"
    journal.write_text("{}")
    with pytest.raises(ValueError, match="is not a journal of this tool"):
        run("other")

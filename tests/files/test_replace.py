"""What outputs may replace: what the same tool wrote, when told to, and nothing else."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.corpus.filters.model_file import check_output, save_model
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.corpus.merge import merge_datasets
from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
from equilibrium_mcore.data.indexed_files import dataset_paths
from equilibrium_mcore.files.paths import report_path
from equilibrium_mcore.files.replace import mark_folder, writable_folder
from equilibrium_mcore.files.whole import whole_folder, write_whole

ROOT = Path(__file__).parents[2]


def dataset(prefix: Path, tokens: list[int]) -> Path:
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.array(tokens, np.uint16).tobytes(), np.array([len(tokens)], np.int32))
        writer.finish()
        writer.publish()
    return prefix


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    for text in ("first", "second"):
        with whole_folder(out, check=lambda: None) as folder:
            (folder / "a").write_text(text)
            mark_folder(folder)
    assert (out / "a").read_text() == "second" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(KeyError), whole_folder(out, check=lambda: {}["no"]) as folder:
        (folder / "a").write_text("third")
    assert (out / "a").read_text() == "second" and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_came_while_the_new_one_was_made_stays(tmp_path):
    out = tmp_path / "out"

    def check():
        writable_folder(out, sources=[], overwrite=True)

    check()
    with pytest.raises(FileExistsError, match="holds mine"), whole_folder(out, check=check):
        out.mkdir()
        (out / "mine").write_text("precious")
    assert (out / "mine").read_text() == "precious" and os.listdir(tmp_path) == ["out"]


def test_a_link_to_a_marked_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    mark_folder(tmp_path / "disk")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert writable_folder(tmp_path / "out", sources=[], overwrite=True) == tmp_path / "disk"


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a.json"])
def test_a_file_that_is_no_datasets_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="is not of an indexed dataset"):
        IndexedWriter(tmp_path / "a", np.uint16, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"


def test_merging_into_an_input_is_refused(tmp_path, monkeypatch):
    a, b = dataset(tmp_path / "a", [1, 2]), dataset(tmp_path / "b", [3])
    before = dataset_paths(a)[0].read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.bin").symlink_to("a.bin")
    for output in (a, Path("a"), Path("link")):
        with pytest.raises(FileExistsError, match="is the input"):
            merge_datasets(prefixes=[a, b], output_prefix=output, overwrite=True)
    assert dataset_paths(a)[0].read_bytes() == before
    merge_datasets(prefixes=[b], output_prefix=a, overwrite=True)
    assert dataset_paths(a)[0].read_bytes() == dataset_paths(b)[0].read_bytes()


def test_a_tokenizer_is_replaced_only_when_asked(data, tmp_path):
    text = Path(data["tokenizer"]["model"]).with_name("first.jsonl")
    output = tmp_path / "tokenizer.model"
    settings = {"inputs": [text], "output": output, "vocab_size": 512, "threads": 1}
    output.write_text("a foreign file")
    with pytest.raises(FileExistsError, match="exists already; pass --overwrite"):
        train_tokenizer(**settings)
    with pytest.raises(FileExistsError, match="is not a SentencePiece model"):
        train_tokenizer(**settings, overwrite=True)
    assert output.read_text() == "a foreign file"
    output.unlink()
    (tmp_path / "tokenizer.model.partial").write_text("mine")
    train_tokenizer(**settings)
    first = output.stat().st_ino
    train_tokenizer(**settings, overwrite=True)
    assert output.stat().st_ino != first
    assert (tmp_path / "tokenizer.model.partial").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is the input"):
        train_tokenizer(inputs=[text], output=text, vocab_size=512, overwrite=True)


def test_a_filters_model_is_replaced_only_when_asked(tmp_path):
    output = tmp_path / "m.safetensors"
    check_output(output, inputs=[], overwrite=False)
    output.write_text("a foreign file")
    with pytest.raises(FileExistsError, match="is not a filter's model"):
        check_output(output, inputs=[], overwrite=True)
    save_model(output, kind="k", settings={}, arrays={"weights": np.zeros(1, np.float32)})
    check_output(output, inputs=[], overwrite=True)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        check_output(output, inputs=[], overwrite=False)
    with pytest.raises(FileExistsError, match="is the input"):
        check_output(output, inputs=[output], overwrite=True)


def test_a_report_replaces_files_alone(tmp_path):
    """Running as root, a rename would put a file in the place of /dev/null, or of a pipe."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match="no regular file"):
            write_whole(tmp_path / name, "report")
        with pytest.raises(argparse.ArgumentTypeError, match="is not replaced"):
            report_path(str(tmp_path / name))
    (tmp_path / "link").symlink_to("real.json")
    write_whole(tmp_path / "real.json", "older")
    assert report_path(str(tmp_path / "link")) == tmp_path / "real.json"
    assert report_path(str(tmp_path / "new.json")) == tmp_path / "new.json"


def test_text_of_the_example_is_replaced_only_when_asked(tmp_path):
    script = [sys.executable, str(ROOT / "examples/stdlib_text.py"), "--max-megabytes", "0.05"]
    script += ["--output-directory", str(tmp_path)]
    (tmp_path / "prose.jsonl").write_text("mine")
    for options, message in (([], "pass --overwrite"), (["--overwrite"], "is not text of this")):
        done = subprocess.run([*script, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and message in done.stderr
    assert os.listdir(tmp_path) == ["prose.jsonl"]

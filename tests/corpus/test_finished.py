"""A command that finds its own finished work says so; a kill at any step of the end loses nothing.

Each kill is of a fork of one script: the process kills itself before or after the N-th renaming or
removing, N = 1, 2, ... up to the last.
"""

import json
import os
import subprocess
import sys

import pytest

from equilibrium_mcore.corpus.merge import merge_datasets
from equilibrium_mcore.corpus.partitions import preprocess_in_partitions
from equilibrium_mcore.corpus.preprocess import preprocess
from equilibrium_mcore.data.indexed_files import read_manifest
from tests.support.tool_faults import PATIENCE_SECONDS, environment

ENDINGS = ("bin", "idx", "json")
KEYS = ("text", "more")
KILLS = """
import json, os, signal, sys
from pathlib import Path
from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.merge import merge_datasets
from equilibrium_mcore.corpus.partitions import preprocess_in_partitions
from equilibrium_mcore.corpus.preprocess import preprocess

values = json.loads(sys.argv[1])
folder, what = Path(values["folder"]), values["what"]
settings = values["settings"]
settings["inputs"] = [Path(path) for path in settings["inputs"]]
settings["tokenizer"] = TokenizerConfig.model_validate_json(settings["tokenizer"])

def work(prefix, stop):
    if what == "partitions":
        for number in (1, 2):
            preprocess_in_partitions(
                output_prefix=prefix, partitions=2, partition=number, **settings
            )
        stop()
        preprocess_in_partitions(output_prefix=prefix, partitions=2, **settings)
    elif what == "merge":
        stop()
        twice = [folder / "one_text_document"] * 2
        merge_datasets(prefixes=twice, output_prefix=prefix, allow_repeats=True)
    else:
        stop()
        preprocess(output_prefix=prefix, **settings)

def stop_at(number):
    steps = 0
    def counted(function):
        def call(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    os.replace, os.unlink = counted(os.replace), counted(os.unlink)

number = 0
while True:
    number += 1
    child = os.fork()
    if not child:
        work(folder / f"set{number}", lambda: stop_at(number))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
print(number - 1)
"""


def files_of(prefix) -> list[bytes]:
    return [prefix.with_name(f"{prefix.name}.{ending}").read_bytes() for ending in ENDINGS]


@pytest.fixture
def settings(tmp_path, texts, tokenizer_config):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": t, "more": t[:9]}) + "\n" for t in texts[:40]))
    return {
        "inputs": [source],
        "tokenizer": tokenizer_config,
        "append_eod": True,
        "json_keys": KEYS,
        "workers": 1,
    }


@pytest.fixture
def kill_at_every_step(tmp_path, settings):
    """Runs the script; returns how many kills there were, of runs to set1, set2, ..."""

    def call(what: str) -> int:
        plain = {**settings, "inputs": [str(path) for path in settings["inputs"]]}
        plain["tokenizer"] = settings["tokenizer"].model_dump_json()
        values = {"folder": str(tmp_path), "what": what, "settings": plain}
        done = subprocess.run(
            [sys.executable, "-c", KILLS, json.dumps(values)],
            env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return call


def test_killed_at_every_step_of_the_end(tmp_path, settings, kill_at_every_step, capsys):
    whole = preprocess(output_prefix=tmp_path / "whole", **settings)
    kills = kill_at_every_step("preprocess")
    assert kills >= 7  # the journal, and three names of each of two datasets
    said = 0
    for number in range(1, kills + 1):
        capsys.readouterr()
        done = preprocess(output_prefix=tmp_path / f"set{number}", **settings)
        said += "there already" in capsys.readouterr().err
        for key in KEYS:
            assert files_of(done.prefixes[key]) == files_of(whole.prefixes[key])
        assert (done.documents, done.tokens) == (whole.documents, whole.tokens)
    assert kills - 4 <= said < kills  # all but those before the journal says that all is whole
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".partial", ".tmp"))]


def test_merges_killed_at_every_step(tmp_path, settings, kill_at_every_step, capsys):
    one = preprocess(output_prefix=tmp_path / "one", **settings).prefixes["text"]
    merge_datasets(prefixes=[one, one], output_prefix=tmp_path / "whole", allow_repeats=True)
    kills = kill_at_every_step("merge")
    assert kills >= 3
    for number in range(1, kills + 1):
        merge_datasets(
            prefixes=[one, one], output_prefix=tmp_path / f"set{number}", allow_repeats=True
        )
        assert files_of(tmp_path / f"set{number}") == files_of(tmp_path / "whole")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_partitions_killed_at_every_step(tmp_path, settings, kill_at_every_step):
    whole = preprocess(output_prefix=tmp_path / "whole", **settings)
    kills = kill_at_every_step("partitions")
    assert kills >= 18  # three names of each of two datasets, and their twelve parts' files
    for number in range(1, kills + 1):
        prefix = tmp_path / f"set{number}"
        done = preprocess_in_partitions(output_prefix=prefix, partitions=2, **settings)
        for key in KEYS:
            assert files_of(done.prefixes[key]) == files_of(whole.prefixes[key])
    assert not list(tmp_path.glob("*part*"))


def test_finished_work_is_found_and_nothing_else_is(tmp_path, settings, texts, capsys):
    prefix = tmp_path / "set"
    first = preprocess(output_prefix=prefix, **settings)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("set*"))]
    for changes in ({}, {"workers": 2}, {"skip_bad_lines": True}, {"restart": True}):
        again = preprocess(output_prefix=prefix, **(settings | changes))
        assert again.found and (again.documents, again.tokens) == (first.documents, first.tokens)
        assert "there already, made of the same" in capsys.readouterr().err
    assert preprocess_in_partitions(output_prefix=prefix, partitions=3, **settings).found
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("set*"))]

    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x", "more": "y"}\n')
    for changes, words in (
        ({"append_eod": False}, "--append-eod was True and is False"),
        ({"inputs": [other]}, f"{settings['inputs'][0]} with .* bytes was an input"),
        ({"inputs": [*settings["inputs"], other]}, "number of inputs was 1 and is 2"),
        ({"partition": 1, "partitions": 2}, "its partition was None and is '1 of 2'"),
        ({"json_keys": ["text", "more", "third"]}, "'third' is missing beside it"),
    ):
        with pytest.raises(FileExistsError, match=f"{words}.*--overwrite"):
            preprocess(output_prefix=prefix, **(settings | changes))
    source = settings["inputs"][0]
    os.utime(source, ns=(0, (tmp_path / "set_text_document.json").stat().st_mtime_ns + 1))
    with pytest.raises(FileExistsError, match=f"{source} is another file than it was"):
        preprocess(output_prefix=prefix, **settings)
    manifests = sorted(tmp_path.glob("set*.json"))
    for path in manifests:  # of a version that did not note when an input was changed
        content = json.loads(path.read_text())
        for entry in content["inputs"]:
            del entry["modified_ns"]
        path.write_text(json.dumps(content))
    later = max(path.stat().st_mtime_ns for path in manifests) + 1
    os.utime(source, ns=(0, later))
    with pytest.raises(FileExistsError, match=f"{source} was changed after it"):
        preprocess(output_prefix=prefix, **settings)
    assert not preprocess(output_prefix=prefix, overwrite=True, **settings).found


def test_bad_lines_left_out_are_not_what_a_strict_command_makes(tmp_path, settings):
    with settings["inputs"][0].open("a") as stream:
        stream.write("nonsense\n")
    preprocess(output_prefix=tmp_path / "set", skip_bad_lines=True, **settings)
    assert preprocess(output_prefix=tmp_path / "set", skip_bad_lines=True, **settings).found
    with pytest.raises(FileExistsError, match="1 bad lines were left out by --skip-bad-lines"):
        preprocess(output_prefix=tmp_path / "set", **settings)


def test_a_damaged_or_unknown_dataset_is_not_taken_for_it(tmp_path, settings):
    prefix = preprocess(output_prefix=tmp_path / "set", **settings).prefixes["text"]
    os.truncate(f"{prefix}.bin", 100)
    with pytest.raises(ValueError, match=r"set_text_document\.bin is cut short"):
        preprocess(output_prefix=tmp_path / "set", **settings)
    os.unlink(f"{prefix}.json")
    with pytest.raises(FileExistsError, match="no manifest says what it is.*--overwrite"):
        preprocess(output_prefix=tmp_path / "set", **settings)


def test_a_merge_that_is_there_is_compared_byte_for_byte(tmp_path, settings, capsys):
    done = preprocess(output_prefix=tmp_path / "one", **settings)
    one, more = done.prefixes["text"], tmp_path / "more"
    preprocess(output_prefix=more, **(settings | {"append_eod": False}))
    with pytest.raises(ValueError, match="hold the same data, which would come twice"):
        merge_datasets(prefixes=[one, one], output_prefix=tmp_path / "both")
    merge_datasets(prefixes=[one, one], output_prefix=tmp_path / "both", allow_repeats=True)
    merge_datasets(prefixes=[one, one], output_prefix=tmp_path / "both", allow_repeats=True)
    assert "there already" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge_datasets(prefixes=[one], output_prefix=tmp_path / "both")
    data = bytearray((tmp_path / "both.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "both.bin").write_bytes(data)
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge_datasets(prefixes=[one, one], output_prefix=tmp_path / "both", allow_repeats=True)
    assert read_manifest(tmp_path / "both").documents == 2 * done.documents

"""JSONL to .bin/.idx: Megatron's bytes, honest about bad lines, never half-written."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.corpus.preprocess import preprocess
from equilibrium_mcore.corpus.preprocess_run import BadLinesError
from equilibrium_mcore.data.indexed_files import read_header, read_manifest, token_dtype
from tests.support.tool_faults import (
    HOLD,
    KILL_A_WORKER,
    PATIENCE_SECONDS,
    SMALL_RANGES,
    environment,
    wait_for,
    with_fault,
)


@pytest.fixture
def run(tmp_path, tokenizer_config):
    """`preprocess` with the usual arguments; returns the prefix of the dataset of `text`."""

    def call(inputs, **changes):
        arguments = {
            "inputs": inputs,
            "output_prefix": tmp_path / "out" / "set",
            "tokenizer": tokenizer_config,
            "append_eod": True,
            **changes,
        }
        return preprocess(**arguments).prefixes["text"]

    return call


def written_by_megatron(path, documents, vocab_size):
    """The same documents through megatron-core's own builder."""
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{path}.idx")


def endings(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(("workers", "range_bytes"), [(1, 1 << 20), (1, 997), (3, 2000)])
def test_bytes_equal_megatron_core(
    tmp_path, run, tokenizer, texts, write_jsonl, workers, range_bytes
):
    documents = [*texts[:120], "", *texts[120:200], "héllo 你好\u2028\x85 line ends"]
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", documents[:50]),
        write_jsonl(tmp_path / "b.jsonl", documents[50:]),
    ]
    inputs[1].write_bytes(inputs[1].read_bytes().removesuffix(b"\n"))
    prefix = run(inputs, workers=workers, range_bytes=range_bytes)

    encoded = [tokenizer.encode(text) for text in documents]
    expected = [[*ids, tokenizer.eod] if ids else [] for ids in encoded]
    written_by_megatron(tmp_path / "megatron", expected, tokenizer.vocab_size)
    for ending in ("bin", "idx"):
        ours = prefix.with_name(f"{prefix.name}.{ending}").read_bytes()
        assert ours == (tmp_path / f"megatron.{ending}").read_bytes()

    dataset = IndexedDataset(str(prefix))
    filled = [ids for ids in expected if ids]
    assert len(dataset) == len(filled) and len(dataset.document_indices) == len(documents) + 1
    assert all(dataset[i].tolist() == ids for i, ids in enumerate(filled))
    manifest = read_manifest(prefix)
    assert manifest.documents == len(documents)
    assert manifest.tokens == sum(map(len, expected))
    assert manifest.largest_token == max(map(max, filled))
    assert manifest.tokenizer_sha256 == tokenizer.fingerprint
    assert [entry["lines"] for entry in manifest.inputs] == [50, len(documents) - 50]
    header = read_header(prefix)
    assert (header.sequences, header.documents) == (len(filled), len(documents))
    assert endings(prefix.parent) == [f"{prefix.name}.{e}" for e in ("bin", "idx", "json")]


@pytest.mark.parametrize("vocab_size", [65499, 65500, 70000])
def test_token_type_is_megatron_cores(tmp_path, vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype is DType.optimal_dtype(vocab_size)
    ids = [[0, vocab_size - 1], [5]]
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        writer.add(np.array(sum(ids, []), dtype).tobytes(), np.array([2, 1], np.int32))
        writer.finish()
        written_by_megatron(tmp_path / "megatron", ids, vocab_size)
        for ending in ("bin", "idx"):
            ours = (tmp_path / f"ours.{ending}.partial").read_bytes()
            assert ours == (tmp_path / f"megatron.{ending}").read_bytes()


def test_several_keys_and_no_eod(tmp_path, tokenizer, tokenizer_config):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"title": "one", "body": "two three"}) + "\n")
    done = preprocess(
        inputs=[source],
        output_prefix=tmp_path / "set",
        tokenizer=tokenizer_config,
        json_keys=["title", "body"],
    )
    assert endings(tmp_path)[1:] == [
        f"set_{key}_document.{e}" for key in ("body", "title") for e in ("bin", "idx", "json")
    ]
    for key, text in (("title", "one"), ("body", "two three")):
        dataset = IndexedDataset(str(done.prefixes[key]))
        assert dataset[0].tolist() == tokenizer.encode(text)


BAD_LINES = {
    3: (b'{"text": "cut', "not JSON"),
    4: (b'["text"]', "not a JSON object but an array"),
    6: (b'{"txt": "x"}', "no key 'text'; it has 'txt'"),
    7: (b'{"text": null}', "'text' is not a string but null"),
    9: (b'{"text": "\xff"}', "not UTF-8"),
    10: (b'{"text": "\\ud83d"}', "surrogate"),
    11: (b"[" * 100_000, "not usable JSON"),
}


@pytest.fixture
def bad_file(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = b'{"text": "good line"}'
    lines = [BAD_LINES[n][0] if n in BAD_LINES else good for n in range(1, 14)]
    lines[1] = b"  "  # a blank line is no document and no error
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\r\n")
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_fail_the_run(tmp_path, run, bad_file, write_jsonl, capsys, workers):
    first = write_jsonl(tmp_path / "first.jsonl", ["fine"])
    with pytest.raises(BadLinesError, match=rf"^7 bad lines.*{bad_file}, line 3.*--skip-bad-lines"):
        run([first, bad_file], range_bytes=40, workers=workers)
    shown = capsys.readouterr().err.splitlines()
    for line, (number, (_, reason)) in zip(shown, BAD_LINES.items(), strict=True):
        assert line.startswith(f"{bad_file}, line {number}: ") and reason in line
    assert endings(tmp_path / "out") == []


def test_bad_lines_are_left_out_on_request(run, bad_file, tokenizer, capsys):
    prefix = run([bad_file], skip_bad_lines=True)
    assert len(capsys.readouterr().err.splitlines()) == 7  # before others warn
    dataset = IndexedDataset(str(prefix))
    good = [*tokenizer.encode("good line"), tokenizer.eod]
    assert [dataset[i].tolist() for i in range(len(dataset))] == [good] * 5
    assert read_manifest(prefix).skipped_lines == 7


def test_only_the_first_bad_lines_are_shown(tmp_path, run, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n" * 50)
    with pytest.raises(BadLinesError, match="^50 bad lines"):
        run([path], range_bytes=100)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 21 and "line 20:" in shown[19] and shown[20] == "... and 30 more"


def test_existing_output_is_kept_unless_told(tmp_path, run, write_jsonl):
    first = write_jsonl(tmp_path / "first.jsonl", ["the first"])
    second = write_jsonl(tmp_path / "second.jsonl", ["the second", "and more"])
    prefix = run([first])
    before = {name: (prefix.parent / name).read_bytes() for name in endings(prefix.parent)}
    with pytest.raises(FileExistsError, match="--overwrite"):
        run([second])
    second.write_text("nonsense\n")
    with pytest.raises(BadLinesError):
        run([second], overwrite=True)
    assert {n: (prefix.parent / n).read_bytes() for n in endings(prefix.parent)} == before
    write_jsonl(second, ["the second", "and more"])
    run([second], overwrite=True)
    assert len(IndexedDataset(str(prefix))) == 2


def test_wrong_arguments(tmp_path, run, write_jsonl, tokenizer_config):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        run([source, tmp_path / "no.jsonl"])
    with pytest.raises(ValueError, match="more than once"):
        run([source, source])
    with pytest.raises(ValueError, match="--workers 0"):
        run([source], workers=0)
    with pytest.raises(ValueError, match="nothing to write"):
        run([empty])
    missing = tokenizer_config.model_copy(update={"model": tmp_path / "no.model"})
    with pytest.raises(FileNotFoundError, match=r"no\.model"):
        run([source], tokenizer=missing)
    assert endings(tmp_path / "out") == []


def test_one_run_at_a_time(tmp_path, run, write_jsonl, monkeypatch):
    monkeypatch.setattr("equilibrium_mcore.corpus.indexed_writer.LOCK_PATIENCE_SECONDS", 0.2)
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with IndexedWriter(tmp_path / "out" / "set_text_document", np.uint16):
        with pytest.raises(FileExistsError, match="another run is writing"):
            run([source])
        # The writer's files are still there.
        assert endings(tmp_path / "out") == [
            "set_text_document.bin.partial",
            "set_text_document.lengths.partial",
        ]
    run([source])


def words_of(tokenizer_config, source, folder, *more):
    """The tool's command line for `source`, with two workers."""
    words = ["--input", source, "--output-prefix", folder / "set", "--workers", "2", *more]
    kind, model = tokenizer_config.type, tokenizer_config.model
    return [*words, "--tokenizer-type", kind, "--tokenizer-model", model, "--append-eod"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_midway_leaves_no_final_file(tmp_path, tokenizer_config, texts, write_jsonl, stop):
    source, folder = write_jsonl(tmp_path / "long.jsonl", texts), tmp_path / "out"
    words = words_of(tokenizer_config, source, folder)
    hold = SMALL_RANGES.format(seconds=60) + HOLD.format(at=100_000, go=str(tmp_path / "go"))
    process = subprocess.Popen(
        with_fault(hold, "preprocess_data.py", *words), env=environment(), stderr=subprocess.PIPE
    )
    partial = folder / "set_text_document.bin.partial"
    wait_for(
        lambda: partial.exists() and partial.stat().st_size, alive=lambda: process.poll() is None
    )
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    process.send_signal(stop)
    if stop == signal.SIGTERM:
        (tmp_path / "go").touch()
    assert process.wait(timeout=PATIENCE_SECONDS) == (-9 if stop == signal.SIGKILL else 143)
    process.stderr.close()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE_SECONDS)
    assert not alive
    assert not [name for name in endings(folder) if not name.endswith(".partial")]
    prefix = folder / "set_text_document"
    journal = prefix.with_name(f"{prefix.name}.journal.partial")
    assert journal.exists() == (stop == signal.SIGTERM)  # the killed one had no time for any
    # With a journal, other inputs are an error; without one, the next run starts from scratch.
    write_jsonl(source, texts[:20])
    again = with_fault("", "preprocess_data.py", *words)
    if stop == signal.SIGTERM:
        refused = subprocess.run(again, env=environment(), capture_output=True, text=True)
        assert refused.returncode == 1 and f"{source} changed" in refused.stderr
        again.append("--restart")
    subprocess.run(again, env=environment(), check=True, capture_output=True)
    assert endings(folder) == [f"{prefix.name}.{e}" for e in ("bin", "idx", "json")]
    assert len(IndexedDataset(str(prefix))) == 20


@pytest.mark.parametrize("at", [-1, 0, 200_000])
def test_a_worker_that_is_killed_ends_the_run(
    tmp_path, tokenizer_config, texts, write_jsonl, run, at
):
    source, folder = write_jsonl(tmp_path / "long.jsonl", texts), tmp_path / "out"
    words = words_of(tokenizer_config, source, folder)
    fault = SMALL_RANGES.format(seconds=60) + KILL_A_WORKER.format(at=at)
    done = subprocess.run(
        with_fault(fault, "preprocess_data.py", *words),
        env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: a worker process died: it was killed, most often because")
    assert "Traceback" not in done.stderr
    if at <= 0:
        assert endings(folder) == []
        return
    # What was written before it died is kept, and the same command resumes from there.
    assert "set_text_document.journal.partial" in endings(folder)
    again = with_fault("", "preprocess_data.py", *words)
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, check=True)
    assert "resuming at" in done.stderr
    whole = run([source], output_prefix=tmp_path / "whole" / "set")
    for ending in ("bin", "idx"):
        ours = folder / f"set_text_document.{ending}"
        assert ours.read_bytes() == whole.with_name(ours.name).read_bytes()


def test_tool_reports_errors_and_starts_fast(tmp_path, repository, tokenizer_config):
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": 1}\n')
    tool = str(repository / "tools" / "preprocess_data.py")
    command = [sys.executable, "-X", "importtime", tool, "--input", source, "--output-prefix"]
    command += [tmp_path / "set", "--tokenizer-type", tokenizer_config.type]
    command += ["--tokenizer-model", tokenizer_config.model]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{source}, line 1: 'text' is not a string but a number" in done.stderr
    assert "error: 1 bad lines" in done.stderr and "Traceback" not in done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "sentencepiece" in imported
    assert not imported & {"torch", "megatron.core", "transformers"}

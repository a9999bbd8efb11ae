"""Parts made apart and merged are the bytes of one run; so are datasets merged by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from equilibrium_mcore.corpus.merge import merge_datasets
from equilibrium_mcore.corpus.partitions import preprocess_in_partitions
from equilibrium_mcore.corpus.preprocess import preprocess
from equilibrium_mcore.corpus.preprocess_run import BadLinesError
from equilibrium_mcore.data.indexed_files import read_manifest

ENDINGS = ("bin", "idx", "json")


def files_of(prefix) -> list[bytes]:
    return [prefix.with_name(f"{prefix.name}.{ending}").read_bytes() for ending in ENDINGS]


@pytest.fixture
def settings(tmp_path, texts, tokenizer_config):
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, chosen in zip(inputs, (texts[:150], [*texts[150:190], "", ""]), strict=True):
        path.write_text("".join(json.dumps({"text": t, "more": t[:9]}) + "\n" for t in chosen))
    return {
        "inputs": inputs,
        "tokenizer": tokenizer_config,
        "append_eod": True,
        "json_keys": ["text", "more"],
        "range_bytes": 3000,
        "workers": 2,
    }


def test_parts_of_several_hosts(tmp_path, settings):
    whole = preprocess(output_prefix=tmp_path / "whole", **settings)
    for host in (1, 3):
        preprocess_in_partitions(
            output_prefix=tmp_path / "set", partitions=3, partition=host, **settings
        )
    part = tmp_path / "set_part-3-of-3_text_document.idx"
    made = part.stat().st_mtime_ns
    other = {**settings, "append_eod": False}
    with pytest.raises(ValueError, match="part of another run"):
        preprocess_in_partitions(output_prefix=tmp_path / "set", partitions=3, **other)
    assert part.stat().st_mtime_ns == made
    done = preprocess_in_partitions(output_prefix=tmp_path / "set", partitions=3, **settings)
    for key in ("text", "more"):
        assert files_of(done.prefixes[key]) == files_of(whole.prefixes[key])
    assert (done.documents, done.tokens) == (whole.documents, whole.tokens)
    assert not list(tmp_path.glob("*part*"))


def test_parts_are_compared_by_all_that_a_journal_compares(tmp_path, settings):
    """Each change leaves paths and sizes as they were."""
    place = {"output_prefix": tmp_path / "set", "partitions": 2}
    preprocess_in_partitions(partition=1, **place, **settings)
    source = settings["inputs"][0]
    content, times = source.read_bytes(), source.stat()
    other_eod = settings["tokenizer"].model_copy(update={"end_of_document": "<|padding|>"})
    with pytest.raises(ValueError, match="part of another run: its end-of-document id was 1"):
        preprocess_in_partitions(**place, **{**settings, "tokenizer": other_eod})
    source.write_bytes(content.replace(b"e", b"a"))
    os.utime(source, (1e9, 1e9))  # another file of the same size, and older than the part
    with pytest.raises(ValueError, match=rf"another run: {source} is another file than it was"):
        preprocess_in_partitions(**place, **settings)
    source.write_bytes(content)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    part = preprocess_in_partitions(partition=2, **place, **settings).prefixes["more"]
    manifest = json.loads(part.with_name(f"{part.name}.json").read_text())
    for name, value in (("skipped_lines", 3), ("partition", "2 of 3")):
        part.with_name(f"{part.name}.json").write_text(json.dumps({**manifest, name: value}))
        with pytest.raises(ValueError, match="part of another run: .*(3 bad lines|2 of 3)"):
            preprocess_in_partitions(**place, **settings)
    assert not (tmp_path / "set_text_document.idx").exists()


def test_a_file_that_is_meant_to_come_twice(tmp_path, settings):
    link = tmp_path / "link.jsonl"
    link.symlink_to(settings["inputs"][0])
    twice = {**settings, "inputs": [settings["inputs"][0], link, settings["inputs"][0]]}
    with pytest.raises(ValueError, match=r"link\.jsonl \(which is .*more than once"):
        preprocess(output_prefix=tmp_path / "no", **twice)
    twice["allow_repeats"] = True
    whole = preprocess(output_prefix=tmp_path / "whole", **twice)
    parts = preprocess_in_partitions(output_prefix=tmp_path / "set", partitions=3, **twice)
    for key in ("text", "more"):
        assert files_of(parts.prefixes[key]) == files_of(whole.prefixes[key])
    assert whole.documents == 3 * 150


def test_more_parts_than_lines(tmp_path, settings):
    source = tmp_path / "few.jsonl"
    source.write_text('{"text": "one", "more": ""}\n{"text": "two", "more": ""}\n')
    settings = {**settings, "inputs": [source], "json_keys": ["text"]}
    whole = preprocess(output_prefix=tmp_path / "whole", **settings)
    parts = [
        preprocess(output_prefix=tmp_path / f"p{k}", partition=k, partitions=5, **settings)
        for k in range(1, 6)
    ]
    merge_datasets(
        prefixes=[part.prefixes["text"] for part in parts],
        output_prefix=tmp_path / "merged",
    )
    assert files_of(tmp_path / "merged") == files_of(whole.prefixes["text"])


def test_lines_are_counted_from_the_start_of_the_file(tmp_path, settings, capsys):
    bad = settings["inputs"][0]
    lines = bad.read_bytes().splitlines(keepends=True)
    lines[120] = b"nonsense\n"
    bad.write_bytes(b"".join(lines))
    with pytest.raises(BadLinesError, match=rf"{bad}, line 121: not JSON"):
        preprocess(output_prefix=tmp_path / "set", partition=3, partitions=4, **settings)
    with pytest.raises(ValueError, match="partition 3 of 4 failed"):
        preprocess_in_partitions(output_prefix=tmp_path / "set", partitions=4, **settings)
    assert not (tmp_path / "set_text_document.idx").exists()


def test_partition_numbers(tmp_path, settings):
    for partition, partitions in ((0, 2), (3, 2), (2, 1)):
        with pytest.raises(ValueError, match="--partition"):
            preprocess_in_partitions(
                output_prefix=tmp_path / "set",
                partition=partition,
                partitions=partitions,
                **settings,
            )
    with pytest.raises(ValueError, match="--partitions 0"):
        preprocess_in_partitions(output_prefix=tmp_path / "set", partitions=0, **settings)


def write_by_megatron(prefix, documents, dtype=np.uint16):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_merged_as_megatron_core_merges(tmp_path):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 99, size).tolist() for size in (3, 0, 5, 1, 0, 4)]
    parts = [
        write_by_megatron(tmp_path / "one", documents[:2]),
        write_by_megatron(tmp_path / "two", documents[2:]),
    ]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_datasets(prefixes=parts, output_prefix=tmp_path / "ours")
    for ending in ("bin", "idx"):
        ours = (tmp_path / f"ours.{ending}").read_bytes()
        assert ours == (tmp_path / f"theirs.{ending}").read_bytes()
    assert len(IndexedDataset(str(tmp_path / "ours"))) == 4
    assert read_manifest(tmp_path / "ours") is None
    before = (tmp_path / "ours.idx").stat().st_mtime_ns
    merge_datasets(prefixes=parts, output_prefix=tmp_path / "ours")  # found
    assert (tmp_path / "ours.idx").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge_datasets(prefixes=parts[::-1], output_prefix=tmp_path / "ours")


def test_what_does_not_fit_is_not_merged(tmp_path, settings):
    short = write_by_megatron(tmp_path / "short", [[1, 2]])
    long = write_by_megatron(tmp_path / "long", [[1, 2]], np.int32)
    with pytest.raises(ValueError, match="holds int32 tokens and .*short uint16"):
        merge_datasets(prefixes=[short, long], output_prefix=tmp_path / "out")
    one = preprocess(output_prefix=tmp_path / "one", **settings).prefixes["text"]
    other = {**settings, "append_eod": False}
    two = preprocess(output_prefix=tmp_path / "two", **other).prefixes["text"]
    with pytest.raises(ValueError, match="differ in their --append-eod"):
        merge_datasets(prefixes=[one, two], output_prefix=tmp_path / "out")
    builder = IndexedDatasetBuilder(str(tmp_path / "sentences.bin"), dtype=np.uint16)
    builder.add_document([1, 2, 3], [1, 2])
    builder.finalize(str(tmp_path / "sentences.idx"))
    with pytest.raises(ValueError, match="several sequences"):
        merge_datasets(prefixes=[tmp_path / "sentences"], output_prefix=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no"):
        merge_datasets(prefixes=[tmp_path / "no"], output_prefix=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_tools(tmp_path, settings, repository):
    tool = repository / "tools" / "preprocess_data.py"
    tokenizer = settings["tokenizer"]
    command = [sys.executable, tool, "--input", *settings["inputs"], "--append-eod"]
    command += ["--tokenizer-type", tokenizer.type, "--tokenizer-model", tokenizer.model]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run(
        [*command, "--output-prefix", tmp_path / "parts", "--partitions", "2", "--workers", "2"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    whole = preprocess(output_prefix=tmp_path / "whole", **settings).prefixes["text"]
    assert files_of(tmp_path / "parts_text_document") == files_of(whole)
    merge = [sys.executable, repository / "tools" / "merge_datasets.py", "--input", whole, whole]
    merge += ["--output-prefix", tmp_path / "twice"]
    refused = subprocess.run(merge, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "hold the same data" in refused.stderr
    merge.append("--allow-repeats")
    done = subprocess.run(merge, env=environment, check=True, capture_output=True, text=True)
    assert read_manifest(tmp_path / "twice").tokens == 2 * read_manifest(whole).tokens
    assert f"{tmp_path / 'twice'}: " in done.stdout

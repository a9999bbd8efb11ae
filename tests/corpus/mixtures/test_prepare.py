"""From sources to indexed datasets and a blend: every format, budgets, splits, kills, errors."""

import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.corpus.mixtures.manifest import read_mixture_manifest
from equilibrium_mcore.corpus.mixtures.parts import BadRowError
from equilibrium_mcore.data.indexed_files import read_manifest
from equilibrium_mcore.data.sources import check_sources, split_documents
from tests.support.tool_faults import PATIENCE_SECONDS, environment

FORMATS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.feather", "folder"]
ALL = 10**9


def tree(folder: Path) -> dict[str, str]:
    """Every file under its relative path, by its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if ".work" not in path.parts
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(
    tmp_path, name, rows, write_rows, mixture, run, documents_of, tokenizer
):
    source = write_rows(tmp_path / "in" / name, rows)
    config = mixture(("a", source, 1.0, {"max_epochs": 1e6}), total_tokens=ALL)
    manifest = run(config)
    (facts,) = manifest.datasets
    assert (facts.rows, facts.documents, facts.not_needed) == (len(rows), len(rows), 0)
    written = documents_of(tmp_path / "out" / facts.outputs[0].prefix)
    assert sorted(written) == sorted(row["text"] for row in rows)
    assert facts.tokens == sum(len(tokenizer.encode(row["text"])) + 1 for row in rows)
    assert not (tmp_path / "out" / ".work").exists()


def test_ranges_of_a_file_give_each_line_once(tmp_path, rows, write_rows, monkeypatch, mixture):
    from equilibrium_mcore.corpus.mixtures import readers

    source = write_rows(tmp_path / "a.jsonl", rows)
    (dataset,) = mixture(("a", source, 1.0)).datasets
    for size in (97, 4096, 10**9):
        monkeypatch.setattr(readers, "RANGE_BYTES", (size, size))
        parts = readers.parts_of(dataset)
        found = [row["id"] for part in parts for _, row in readers.rows_of(dataset, part)]
        assert found == list(range(len(rows)))


@pytest.mark.parametrize("name", FORMATS)
def test_skipping_rows_is_reading_them_and_forgetting(tmp_path, name, rows, write_rows, mixture):
    from equilibrium_mcore.corpus.mixtures import readers

    source = write_rows(tmp_path / "in" / name, rows)
    (dataset,) = mixture(("a", source, 1.0)).datasets
    for part in readers.parts_of(dataset):
        whole = list(readers.rows_of(dataset, part))
        for skip in (0, 1, 69, 71, len(whole) - 1, len(whole)):
            assert list(readers.rows_of(dataset, part, skip=skip)) == whole[skip:]


def test_blend_is_one_that_training_takes(
    tmp_path, rows, write_rows, mixture, run, tokenizer, documents_of
):
    config = mixture(
        ("a", write_rows(tmp_path / "a.jsonl", rows[:300]), 0.75),
        ("b", write_rows(tmp_path / "b.parquet", rows[300:]), 0.25),
    )
    manifest = run(config)
    blend = parse(DataConfig, read_mapping(tmp_path / "out/blend.yaml"))
    assert [(s.name, s.weight, s.max_epochs) for s in blend.sources] == [
        ("a", 0.75, 4), ("b", 0.25, 4),
    ]  # fmt: skip
    check_sources(blend, tokenizer=tokenizer, model_vocab_size=600, needed={"validation": 1})
    for source, facts in zip(blend.sources, manifest.datasets, strict=True):
        assert facts.rows == facts.documents + facts.not_needed
        # As much as is needed beside validation, and at most one document more.
        wanted = facts.share * 20_000 / 0.9 * 1.01
        longest = max(len(tokenizer.encode(row["text"])) + 1 for row in rows)
        assert wanted <= facts.tokens < wanted + longest or facts.epochs > 1
        begin, end = split_documents(blend.split, facts.documents)[1]
        (output,) = facts.outputs
        assert end - begin == output.validation_documents
        assert abs(output.validation_documents - facts.documents * 0.1) <= 1
        assert read_manifest(source.prefix).tokens == facts.tokens
        texts = documents_of(source.prefix)
        held_out = sum(len(tokenizer.encode(text)) + 1 for text in texts[begin:end])
        assert held_out == output.validation_tokens == facts.validation_tokens


def test_held_out_documents_depend_on_text_and_seed_alone(
    tmp_path, rows, write_rows, mixture, run, documents_of
):
    def held_out(order: list[dict], seed: int) -> set[str]:
        source = write_rows(tmp_path / "a.jsonl", order)
        config = mixture(
            ("a", source, 1.0, {"max_epochs": 1e6}),
            total_tokens=ALL,
            validation={"ratio": 0.1, "seed": seed},
        )
        (facts,) = run(config, overwrite=True).datasets
        texts = documents_of(tmp_path / "out" / facts.outputs[0].prefix)
        return set(texts[-facts.outputs[0].validation_documents :])

    first = held_out(rows, 1)
    assert len(first) == 40
    assert held_out(random.Random(0).sample(rows, len(rows)), 1) == first
    assert len(held_out(rows, 2) & first) < 15  # 4 expected
    # With more documents, nearly all of those held out stay so.
    more = held_out(rows + [{**row, "text": row["text"][::-1]} for row in rows], 1)
    assert len(more) == 80 and len(more & first) > 25


def test_filters_drop_and_duplicates_go_across_sources(tmp_path, rows, write_rows, mixture, run):
    filters = {
        "max_epochs": 1e6,
        "filters": [{"type": "length", "min_length": 200}, {"type": "deduplication"}],
    }
    first = [*rows[:100], *rows[:20]]
    second = rows[80:200]
    config = mixture(
        ("a", write_rows(tmp_path / "a.jsonl", first), 0.5, filters),
        ("b", write_rows(tmp_path / "b.jsonl", second), 0.5, filters),
        total_tokens=ALL,
    )
    a, b = run(config).datasets
    long = [len(row["text"]) >= 200 for row in rows]
    assert a.documents == sum(long[:100]) and b.documents == sum(long[100:200])
    for facts, repeated in ((a, sum(long[:20])), (b, sum(long[80:100]))):
        by_filter = {reason.split(":")[0]: count for reason, count in facts.dropped.items()}
        assert by_filter["deduplication"] == repeated
        assert facts.rows == facts.documents + sum(facts.dropped.values())


def test_result_does_not_depend_on_workers_or_shards(tmp_path, rows, write_rows, mixture, run):
    filters = {"filters": [{"type": "deduplication"}]}
    config = mixture(
        ("a", write_rows(tmp_path / "a.jsonl", rows[:250]), 0.6, filters),
        ("b", write_rows(tmp_path / "b.parquet", rows[200:]), 0.4, filters),
        total_tokens=12_000,
    )
    found = []
    for workers, characters in ((1, 20_000), (3, 20_000), (2, 3_000), (1, 10**9)):
        run(config, workers=workers, shard_characters=characters, overwrite=True)
        result = tree(tmp_path / "out")
        manifest = json.loads((tmp_path / "out/manifest.json").read_text())
        # How much was read and not needed depends on the size of a shard.
        del result["manifest.json"]
        found.append((result, [d["outputs"] for d in manifest["datasets"]]))
    assert all(item == found[0] for item in found)


KILLED = """
import os, signal, sys
from pathlib import Path
from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.corpus.mixtures import prepare, shards, workers

ready, left, main = shards._Draft.write, int(sys.argv[4]), os.getpid()
def counted(self, *arguments, **options):
    global left
    left -= 1
    if left == 0:  # in this process or in a worker; in either the run ends
        os.kill(main if sys.argv[5] == "run" else os.getpid(), signal.SIGKILL)
    return ready(self, *arguments, **options)
shards._Draft.write = counted
if sys.argv[5] == "start":
    workers._start_worker = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    options = prepare.Options(Path(sys.argv[2]), workers=int(sys.argv[3]), shard_characters=20_000)
    try:
        prepare.prepare(load_mixture(sys.argv[1]), options)
    except (ValueError, OSError) as error:  # as the tool does
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
"""


@pytest.fixture
def killed_run(tmp_path):
    """`prepare` in a process that is killed, or whose worker is, at its N-th shard (0: never)."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def call(output, *, workers, after, who="run"):
        words = [script, tmp_path / "mixture.yaml", output, workers, after, who]
        return subprocess.run(
            [sys.executable, *map(str, words)],
            env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        )  # fmt: skip

    return call


@pytest.fixture
def two_datasets(tmp_path, rows, write_rows, mixture):
    dataset = {"max_epochs": 1e6, "filters": [{"type": "deduplication"}]}
    return mixture(
        ("a", write_rows(tmp_path / "a.jsonl.gz", rows[:300]), 0.6, dataset),
        ("b", write_rows(tmp_path / "b.parquet", rows[200:]), 0.4, dataset),
        total_tokens=ALL,
    )


def test_killed_and_called_again_it_writes_the_same_bytes(tmp_path, two_datasets, run, killed_run):
    assert two_datasets == load_mixture(tmp_path / "mixture.yaml")
    run(two_datasets)
    expected = tree(tmp_path / "out")
    output = tmp_path / "again"
    for workers, after in ((1, 5), (2, 4)):
        assert killed_run(output, workers=workers, after=after).returncode == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
    assert list(output.glob(".work/*/*.json"))
    assert killed_run(output, workers=2, after=0).returncode == 0
    found = tree(output)
    run(two_datasets, output=output)  # finds its finished work
    assert tree(output) == found
    for name in ("manifest.json", "blend.yaml"):  # they name their folder, or the versions
        assert found.pop(name) and expected.pop(name)
    assert found == expected
    one, two = (read_mixture_manifest(folder) for folder in (tmp_path / "out", output))
    assert one == two


def test_a_worker_that_is_killed_ends_the_run_and_loses_no_shard(
    tmp_path, two_datasets, run, killed_run
):
    output = tmp_path / "again"
    for who, after in (("start", 0), ("worker", 4)):
        done = killed_run(output, workers=2, after=after, who=who)
        assert done.returncode == 1 and "error: a worker process died" in done.stderr
        assert "Traceback" not in done.stderr
    whole = {path: path.stat().st_mtime_ns for path in output.glob(".work/*/*.json")}
    assert whole
    run(two_datasets, output=output, workers=2, shard_characters=20_000, keep_work=True)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole  # used, not made again


def test_other_shares_use_the_shards_that_are_there(tmp_path, rows, write_rows, mixture, run):
    source = write_rows(tmp_path / "a.jsonl", rows)
    config = mixture(("a", source, 1.0, {"max_epochs": 1}), total_tokens=10**7)
    with pytest.raises(ConfigError, match=r"would be needed, and max_epochs is 1\. .*at most"):
        run(config)
    shards = sorted((tmp_path / "out/.work").glob("a-*/*.bin"))
    assert len(shards) > 3 and not (tmp_path / "out/data").exists()
    times = [path.stat().st_mtime_ns for path in shards]
    run(mixture(("a", source, 1.0), total_tokens=50_000), keep_work=True)
    assert [path.stat().st_mtime_ns for path in shards] == times
    # Another filter is other work.
    run(
        mixture(("a", source, 1.0, {"filters": [{"type": "length", "min_length": 9}]})),
        keep_work=True,
        overwrite=True,
    )
    assert len({path.parent for path in (tmp_path / "out/.work").glob("a-*/*.bin")}) == 2


def test_a_finished_folder_is_used_or_refused(tmp_path, rows, write_rows, mixture, run):
    source = write_rows(tmp_path / "a.jsonl", rows)
    config = mixture(("a", source, 1.0))
    first = run(config)
    before = tree(tmp_path / "out")
    assert run(config) == first and tree(tmp_path / "out") == before
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(mixture(("a", source, 1.0), total_tokens=5_000))
    assert tree(tmp_path / "out") == before
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(FileExistsError, match="no manifest says"):
        run(config)


def test_sample_is_a_trial_without_a_budget(tmp_path, rows, write_rows, mixture, run):
    source = write_rows(tmp_path / "a.jsonl", rows)
    (facts,) = run(mixture(("a", source, 1.0, {"max_epochs": 1})), sample_rows=50).datasets
    assert 50 <= facts.rows == facts.documents < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.unlink(), r"a: source .*a\.jsonl: no such file or folder.*--local a=PATH"),
        (lambda p: p.write_text(""), r"a: source .* is empty: it has no row"),
        (lambda p: p.write_text('{"body": "x"}\n'), r"a: .*line 1: no field 'text'.*'body'"),
        (lambda p: p.write_text('{"text": 3}\n'), r"field 'text' is not text but int"),
    ],
)
def test_bad_sources_are_told_before_work_and_together(
    tmp_path, rows, write_rows, mixture, run, change, message
):
    source = write_rows(tmp_path / "a.jsonl", rows)
    change(source)
    config = mixture(("a", source, 0.5), ("b", tmp_path / "gone.parquet", 0.5))
    with pytest.raises(ConfigError, match=message) as caught:
        run(config)
    assert len(caught.value.problems) == 2 and "gone.parquet" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_told(tmp_path, rows, write_rows, mixture, run):
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"):
        source = write_rows(tmp_path / "in" / name, rows)
        source.write_bytes(source.read_bytes()[: -source.stat().st_size // 3])
        with pytest.raises(ValueError, match=rf"{name}.*(cut short|damaged)"):
            run(mixture(("a", source, 1.0, {"max_epochs": 1e6}), total_tokens=ALL))
        assert not (tmp_path / "out/data").exists()


def test_a_bad_row_stops_or_is_counted(tmp_path, rows, write_rows, mixture, run):
    source = write_rows(tmp_path / "a.jsonl", rows)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[77:79] = [b'{"text": "half\n', b'{"text": 5}\n', b'{"text": null}\n']
    source.write_bytes(b"".join(lines))
    config = mixture(("a", source, 1.0, {"max_epochs": 1e6}), total_tokens=ALL)
    with pytest.raises(BadRowError, match=r"a: .*a\.jsonl, line 78: not JSON .*--skip-bad-rows"):
        run(config)
    (facts,) = run(config, skip_bad_rows=True).datasets
    assert (facts.bad, facts.empty, facts.documents) == (2, 1, len(rows) - 2)
    assert "line 78" in facts.first_bad


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_rows_at_the_beginning(tmp_path, rows, write_rows, mixture, run, ending):
    """The rows that settings are tried on are counted and left out like any other."""
    source = write_rows(tmp_path / f"a.jsonl{ending}", rows)
    opened = gzip.open if ending else open
    with opened(source, "rb") as stream:
        lines = stream.read().splitlines(keepends=True)
    bad = [b'{"text": "half\n', b'{"text": 5}\n', b'{"body": "x"}\n'] * 10
    with opened(source, "wb") as stream:
        stream.writelines([lines[0], *bad, *lines[1:]])
    config = mixture(("a", source, 1.0, {"max_epochs": 1e6}), total_tokens=ALL)
    with pytest.raises(ConfigError, match=r"line 2: not JSON .*Repair.*--skip-bad-rows"):
        run(config)
    (facts,) = run(config, skip_bad_rows=True).datasets
    assert (facts.bad, facts.documents) == (len(bad), len(rows))
    assert f"{source.name}, line 2: not JSON" in facts.first_bad
    with opened(source, "wb") as stream:
        stream.writelines(bad)
    with pytest.raises(ConfigError, match=r"none of the first 30 rows is a document, the first"):
        run(config, skip_bad_rows=True, overwrite=True)


def test_rows_are_named_by_their_line(tmp_path, rows, write_rows, mixture, run):
    source = write_rows(tmp_path / "a.jsonl", rows)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[30:31] = [b"\n", b'{"text": 5}\n']
    source.write_bytes(b"".join(lines))
    with pytest.raises(BadRowError, match=r"a: .*a\.jsonl, line 32: field 'text' is not text"):
        run(mixture(("a", source, 1.0, {"max_epochs": 1e6}), total_tokens=ALL))


def test_the_same_rows_under_two_names(tmp_path, rows, write_rows, mixture, run):
    source = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "copy.jsonl").write_bytes(source.read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link.jsonl").symlink_to(source)
    for other in ("copy.jsonl", "folder"):
        datasets = [
            (n, p, 0.5, {"max_epochs": 1e6})
            for n, p in zip("ab", (source, tmp_path / other), strict=True)
        ]
        with pytest.raises(ConfigError, match=r"b \(.*\) and a \(.*\) read the same data"):
            run(mixture(*datasets, total_tokens=ALL))
    meant = mixture(*datasets, total_tokens=ALL, allow_repeated_sources=True)
    assert [facts.rows for facts in run(meant).datasets] == [len(rows)] * 2


def test_shards_of_another_end_of_document_are_not_used_again(
    tmp_path, rows, write_rows, mixture, run, tokenizer
):
    source = write_rows(tmp_path / "a.jsonl", rows[:40])
    config = mixture(("a", source, 1.0, {"max_epochs": 1e6}), total_tokens=ALL)
    run(config, keep_work=True)
    other = config.tokenizer.model_copy(update={"end_of_document": "<|padding|>"})
    config = config.model_copy(update={"tokenizer": other})
    (facts,) = run(config, keep_work=True, overwrite=True).datasets
    prefix = tmp_path / "out" / facts.outputs[0].prefix
    ends = {int(document[-1]) for document in IndexedDataset(str(prefix))}
    assert ends == {tokenizer.pad_id} and read_manifest(prefix).eod == tokenizer.pad_id


def test_too_small_a_disk_is_told(tmp_path, rows, write_rows, mixture, run):
    source = write_rows(tmp_path / "a.jsonl", rows)
    from equilibrium_mcore.corpus.mixtures.plan import check_disk, make_plan, open_sources

    plan = open_sources(make_plan(mixture(("a", source, 1.0))), ask_hub=False)
    assert "GB free" in check_disk(plan, tmp_path / "out", bytes_per_token=2)
    with pytest.raises(OSError, match="GB of disk needed at most.*--ignore-disk"):
        check_disk(plan, tmp_path / "out", bytes_per_token=10**15)


def test_two_runs_do_not_share_a_folder(tmp_path, rows, write_rows, mixture, run):
    import fcntl

    config = mixture(("a", write_rows(tmp_path / "a.jsonl", rows), 1.0))
    (tmp_path / "out/.work").mkdir(parents=True)
    with (tmp_path / "out/.work/lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run"):
            run(config)

"""The benchmark runs the tool as it is, and does not let different bytes pass."""

import pytest

from tools.bench.measure.preprocess import Runs, _compare, collect_text, run_benchmark


def test_this_project_alone(tmp_path, repository, texts, write_jsonl):
    table = run_benchmark(
        tool=repository / "tools" / "preprocess_data.py",
        folder=tmp_path / "bench",
        megatron=None,
        input_path=write_jsonl(tmp_path / "text.jsonl", texts),
        repetitions=1,
    )
    assert table.splitlines()[2].startswith("| this project | 1 | ")
    assert (tmp_path / "bench" / "out" / "this_project_text_document.idx").is_file()


def test_what_is_missing_is_named(tmp_path, repository):
    tool = repository / "tools" / "preprocess_data.py"
    with pytest.raises(FileNotFoundError, match="git clone"):
        run_benchmark(tool=tool, folder=tmp_path, megatron=tmp_path)
    with pytest.raises(RuntimeError, match="failed with 1: see .*this_project"):
        run_benchmark(tool=tool, folder=tmp_path, megatron=None, input_path=_bad(tmp_path))


def _bad(folder):
    path = folder / "bad.jsonl"
    path.write_text('{"text": "one"}\nnonsense\n')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return path


def test_different_bytes_are_an_error(tmp_path):
    runs = []
    for name in ("one", "two"):
        runs.append(Runs(name, [], tmp_path / name, seconds=[1.0]))
        for ending in ("bin", "idx"):
            (tmp_path / f"{name}.{ending}").write_bytes(b"same")
    assert _compare(runs)
    (tmp_path / "two.idx").write_bytes(b"other")
    with pytest.raises(RuntimeError, match="different bytes"):
        _compare(runs)


@pytest.mark.slow
def test_text_of_this_machine(tmp_path):
    path = collect_text(tmp_path / "text.jsonl", megabytes=0.2)
    assert path.stat().st_size >= 200_000
    before = path.read_bytes()
    assert collect_text(path, megabytes=0.1).read_bytes() == before

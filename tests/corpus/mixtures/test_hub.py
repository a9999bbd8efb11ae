"""Sources that `datasets` opens: as the Hub's would be, from a folder of this machine."""

import pytest

from equilibrium_mcore.config.mixture import DatasetConfig
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.corpus.mixtures import hub
from equilibrium_mcore.corpus.mixtures.readers import is_hub, local_files, parts_of, rows_of


def dataset(source, **changes) -> DatasetConfig:
    values = {"name": "a", "source": str(source), "mix_ratio": 1.0, "format": "hub", **changes}
    config = parse(DatasetConfig, values)
    assert isinstance(config, DatasetConfig), config
    return config


@pytest.fixture
def offline(monkeypatch):
    """No network, also where the libraries were imported before: they read the variable then."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._load.cache_clear()
    yield
    hub._load.cache_clear()


@pytest.fixture
def folder(tmp_path, rows, write_rows, offline):
    """A folder that `load_dataset` takes like a name on the Hub, in three files."""
    for number in range(3):
        write_rows(tmp_path / f"hub/train-{number}.jsonl", rows[number::3])
    return tmp_path / "hub"


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_downloads_and_streams(folder, rows, streaming, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = dataset(folder, streaming=streaming)
    parts = parts_of(config)
    assert len(parts) == (3 if streaming else 1)
    found = [row["id"] for part in parts for _, row in rows_of(config, part)]
    assert sorted(found) == list(range(len(rows)))
    whole = [row["id"] for _, row in rows_of(config, parts[0])]
    assert [row["id"] for _, row in rows_of(config, parts[0], skip=7)] == whole[7:]


def test_preparing_a_stream_stops_when_there_is_enough(folder, mixture, run):
    changes = {"format": "hub", "streaming": True}
    for workers in (1, 2):
        config = mixture(("a", folder, 1.0, changes), total_tokens=4_000)
        (facts,) = run(config, workers=workers, overwrite=True, shard_characters=2_000).datasets
        assert facts.rows < 200 and facts.epochs < 1.2  # a long document may be held out
        assert facts.inputs[0]["streaming"] is True


def test_a_name_that_is_not_there_is_told_with_ways_out(offline):
    config = dataset("nobody/nothing", format=None)
    assert is_hub(config)
    with pytest.raises(ValueError, match=r"(?s)nobody/nothing is not a file.*--local a=PATH"):
        parts_of(config)


def test_what_is_local_and_what_is_not(tmp_path, monkeypatch, rows, write_rows):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "here/data/b.jsonl", rows[:3])
    write_rows(tmp_path / "here/data/a.jsonl.gz", rows[:3])
    for source in ("./owner/name", "owner/name.jsonl", "a/b/c", "here/data", "x.parquet"):
        assert not is_hub(dataset(source, format=None)), source
    names = [path.name for path in local_files(dataset("here", format=None))]
    assert names == ["a.jsonl.gz", "b.jsonl"]
    assert len(local_files(dataset("here/**/*.gz", format=None))) == 1
    write_rows(tmp_path / "here/data/c.parquet", rows[:3])
    with pytest.raises(ValueError, match=r"found \.gz, \.jsonl, \.parquet; set `format`"):
        local_files(dataset("here", format=None))
    assert len(local_files(dataset("here", format="parquet"))) == 1

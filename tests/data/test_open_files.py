"""A dataset that changes under a run is an error that names the file: no SIGBUS, no silence."""

import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.data import open_files
from equilibrium_mcore.data.blend import build_datasets
from equilibrium_mcore.data.loader import batches
from equilibrium_mcore.data.open_files import OpenFiles

SAMPLES = 200


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def _with_another_time(path: Path) -> None:
    # Some file systems count time in steps: a test may write twice within one, a user does not.
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 10_000_000))


def replace(path: Path) -> None:
    shutil.copyfile(path, f"{path}.new")
    _with_another_time(Path(f"{path}.new"))
    os.replace(f"{path}.new", path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\1" * 64)
    _with_another_time(path)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = (truncate, empty, replace, overwrite, remove)


@pytest.fixture
def build(two_sources):
    def call(order):
        data = two_sources.model_copy(update={"order": order})
        sizes = {"sequence_length": 32, "train_samples": SAMPLES, "validation_samples": 0}
        return build_datasets(data, seed=5, **sizes).train

    return call


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("order", ["ledger", "megatron"])
def test_a_change_is_an_error(build, two_sources, monkeypatch, order, ending, change):
    monkeypatch.setattr(open_files, "CHECK_SECONDS", 0.0)
    train = build(order)
    for number in range(50):
        train[number]
    path = Path(f"{two_sources.sources[0].prefix}.{ending}")
    change(path)
    with pytest.raises(ValueError, match=f"{path} changed while the run reads it.*--verify"):
        for number in range(50, SAMPLES):
            train[number]


@pytest.mark.parametrize("order", ["ledger", "megatron"])
def test_a_file_cut_short_is_noticed_at_once(build, two_sources, monkeypatch, order):
    monkeypatch.setattr(open_files, "CHECK_SECONDS", 1e9)  # nobody looks at size or time
    train = build(order)
    train[0], train[1], train[2]
    path = Path(f"{two_sources.sources[0].prefix}.bin")
    empty(path)
    with pytest.raises(ValueError, match=f"{path} changed .*: it ends at byte 0"):
        for number in range(3, 40):
            train[number]


@pytest.mark.parametrize("order", ["ledger", "megatron"])
def test_workers_of_a_loader_say_it_too(build, two_sources, order):
    loader = batches(
        build(order),
        consumed_samples=0,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=1,
    )
    next(loader)
    path = Path(f"{two_sources.sources[0].prefix}.bin")
    empty(path)
    with pytest.raises(ValueError, match=f"{path} changed while the run reads it"):
        for _ in range(SAMPLES - 1):
            next(loader)


def test_nothing_changed_is_no_error(build, two_sources, monkeypatch):
    monkeypatch.setattr(open_files, "CHECK_SECONDS", 0.0)
    train = pickle.loads(pickle.dumps(build("megatron")))
    for source in two_sources.sources:  # read, linked, and opened by others
        Path(f"{source.prefix}.bin").read_bytes()
        os.link(f"{source.prefix}.bin", f"{source.prefix}.link")
    assert all(train[number]["tokens"].numel() == 32 for number in range(SAMPLES))


def test_a_file_is_compared_when_it_is_opened_again(tmp_path):
    files = OpenFiles(limit=1)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(range(40)))
        files.expect(path)
        assert files.read(path, np.uint8, offset=3, count=2).tolist() == [3, 4]
    replace(paths[0])
    for reader in (files, pickle.loads(pickle.dumps(files))):
        with pytest.raises(ValueError, match=f"{paths[0]} changed"):
            reader.read(paths[0], np.uint8, offset=3, count=2)
        assert reader.read(paths[1], np.uint8, offset=0, count=1).tolist() == [0]

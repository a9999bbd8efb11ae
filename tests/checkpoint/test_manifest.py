"""Sizes and hashes of files."""

from __future__ import annotations

import random

import pytest

from equilibrium_mcore.checkpoint.manifest import (
    DamagedCheckpointError,
    describe_file,
    read_manifest,
    shares,
    write_manifest,
    wrong_hashes,
    wrong_sizes,
)


@pytest.fixture
def folder(tmp_path):
    """Three files with a manifest; two are of one size."""
    rng = random.Random(0)
    for name, size in (("a", 4096), ("b", 4096), ("c", 7)):
        (tmp_path / name).write_bytes(rng.randbytes(size))
    write_manifest(tmp_path, {name: describe_file(tmp_path / name) for name in "abc"})
    return tmp_path


def damages(folder):
    files = read_manifest(folder)
    return wrong_sizes(folder, files) + wrong_hashes(folder, files, files)


def test_whole_files_pass(folder):
    assert damages(folder) == []


def test_every_flipped_bit_is_noticed(folder):
    rng, content = random.Random(1), (folder / "a").read_bytes()
    for _ in range(50):
        bit = rng.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / "a").write_bytes(changed)
        assert [damage.file for damage in damages(folder)] == ["a"]


def test_files_in_each_others_place_are_noticed(folder):
    (folder / "a").rename(folder / "x")
    (folder / "b").rename(folder / "a")
    (folder / "x").rename(folder / "b")
    found = {damage.file: damage.what for damage in damages(folder)}
    assert found.keys() == {"a", "b"} and "which is b's" in found["a"]


def test_no_flipped_bit_of_the_manifest_passes(folder):
    """It is no manifest, or it fits the files no longer; a changed space alone does not matter."""
    path = folder / "manifest.json"
    content = path.read_bytes()
    for bit in random.Random(2).sample(range(8 * len(content)), 200):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            files = read_manifest(folder)
        except DamagedCheckpointError as error:
            assert "manifest.json" in str(error)
        else:
            assert damages(folder) or files == {n: describe_file(folder / n) for n in "abc"}


def test_the_work_is_shared_by_bytes():
    files = {f"__{rank}_0.distcp": {"bytes": size} for rank, size in enumerate((9, 5, 4, 1, 1))}
    lists = shares(files, 2)
    assert sorted(name for names in lists for name in names) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in names) for names in lists]
    assert loads == [10, 10]
    assert shares(files, 8)[5:] == [[], [], []]

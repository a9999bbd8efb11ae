"""Files are whole or absent, and removing never leaves a half under the name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from equilibrium_mcore.files.paths import expand_path
from equilibrium_mcore.files.whole import (
    REMOVED,
    remove_tree,
    rename_durably,
    whole_file,
    write_whole,
)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "facts.json"
    write_whole(path, "first")
    write_whole(path, b"second\n")
    assert path.read_bytes() == b"second\n"
    assert os.listdir(path.parent) == ["facts.json"]


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What is synced and renamed, in order: by the names of files and folders."""
    seen: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor):
        seen.append(f"sync {Path(f'/proc/self/fd/{descriptor}').resolve().name}")
        sync(descriptor)

    def renamed(source, target):
        seen.append(f"rename {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are Linux's")
def test_content_is_on_the_disk_before_its_name_and_then_the_name(tmp_path, order):
    folder = tmp_path / "new"
    write_whole(folder / "facts.json", "first")
    content, name, names = order
    assert content.startswith("sync .facts.json.") and content.endswith(".tmp")
    assert (name, names) == ("rename facts.json", "sync new")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are Linux's")
def test_a_rename_into_another_folder_is_on_the_disk_in_both(tmp_path, order):
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "step").write_text("x")
    rename_durably(tmp_path / "from" / "step", tmp_path / "to" / "step")
    assert order == ["rename step", "sync to", "sync from"]
    with pytest.raises(FileNotFoundError):
        rename_durably(tmp_path / "from" / "step", tmp_path / "to" / "step")


def test_a_failing_writer_changes_nothing(tmp_path):
    path = tmp_path / "facts.json"
    write_whole(path, "before")
    with pytest.raises(KeyError), whole_file(path) as stream:
        stream.write("half")
        raise KeyError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["facts.json"]


def test_files_that_look_temporary_are_left_alone(tmp_path):
    for name in ("facts.tmp", "facts.partial", "facts.old", ".facts.tmp"):
        (tmp_path / name).write_text("the user's")
    write_whole(tmp_path / "facts", "ours")
    assert len(os.listdir(tmp_path)) == 5
    assert (tmp_path / "facts.tmp").read_text() == "the user's"


def test_a_folder_that_is_half_removed_has_another_name(tmp_path, monkeypatch):
    folder = tmp_path / "step_00000008"
    folder.mkdir()
    (folder / "state.json").write_text("{}")

    def killed(path, *arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_tree(folder)
    assert not folder.exists()
    assert [name.endswith(REMOVED) for name in os.listdir(tmp_path)] == [True]


def test_of_a_link_the_link_alone_is_removed(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(folder)
    remove_tree(link)
    assert folder.is_dir() and not link.is_symlink()


def test_home_and_variables_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("USER_X", "a")
    assert str(expand_path("~/runs")) == "/home/somebody/runs"
    assert str(expand_path("$SCRATCH/runs/${USER_X}b")) == "/scratch/runs/ab"
    assert str(expand_path("plain/path")) == "plain/path"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ValueError, match="SCRATCH is not set"):
        expand_path("$SCRATCH/runs")
    with pytest.raises(ValueError, match="nobody_of_this_name"):
        expand_path("~nobody_of_this_name/runs")

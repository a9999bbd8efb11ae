"""Errors of the operating system: which file, what failed, a way out; never a library's words."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.files import errors
from equilibrium_mcore.files.errors import FileContentError, in_words, naming, reason, told_in_words
from equilibrium_mcore.files.named import open_named
from equilibrium_mcore.files.whole import remove_rest, whole_file

FULL = Path("/dev/full")  # every write finds no room


@pytest.mark.parametrize("number", sorted(errors._WORDS))
def test_every_number_has_a_file_a_reason_and_a_way_out(number):
    text = in_words(OSError(number, os.strerror(number), "/some/file"))
    file, what, way_out = text.split(": ", 2)
    assert file == "/some/file" and os.strerror(number) in what and way_out


def test_a_full_disk_says_how_much_is_free(tmp_path):
    text = in_words(
        OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "new" / "file"))
    )
    assert " are free" in text and str(tmp_path) in text


def test_an_error_with_its_own_words_keeps_them():
    assert in_words(OSError("a whole sentence")) == "a whole sentence"


@pytest.mark.parametrize("mode", ["w", "wb", "a+b"])
def test_a_file_names_itself_when_its_bytes_find_no_room(mode):
    with pytest.raises(OSError) as caught, open_named(FULL, mode) as stream:
        stream.write("text" if mode == "w" else b"bytes")  # buffered: fails at the end
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(FULL)


def test_a_whole_file_is_named_and_not_its_temporary_name(tmp_path):
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_libraries_that_hide_the_number_are_seen_through(tmp_path):
    for write in (
        lambda path: save_file({"x": torch.zeros(4)}, path),
        lambda path: torch.save([1], path),
    ):
        file = tmp_path / "no" / "folder" / "file"
        with pytest.raises(OSError) as caught, naming(file):
            write(str(file))
        assert caught.value.errno == errno.ENOENT and caught.value.filename == str(file)


def test_names_survive_the_way_to_another_process():
    with pytest.raises(OSError) as caught, naming("/some/file"):
        raise OSError(errno.EIO, "Input/output error")
    assert in_words(pickle.loads(pickle.dumps(caught.value))) == in_words(caught.value)


def test_content_that_is_wrong_is_told_without_the_loaders_traceback():
    inner = "Caught FileContentError in DataLoader worker process 0.\nOriginal Traceback (most"
    inner += " recent call last):\n  File x\nequilibrium_mcore.files.errors.FileContentError: a.bin"
    error = FileContentError(f"{inner} is gone")
    assert isinstance(error, ValueError) and in_words(error) == "a.bin is gone"


def test_why_a_file_cannot_be_read_is_a_line():
    for read in (
        lambda: json.loads("{"),
        lambda: b"\xff".decode(),
        lambda: {}["key"],
        lambda: None.x,
        lambda: Path("/no/file").read_text(),
        lambda: pickle.loads(b""),
    ):
        with pytest.raises(Exception) as caught:
            read()
        text = reason(caught.value)
        assert text and type(caught.value).__name__ not in text and "\n" not in text


def test_a_folder_may_be_removed_by_two(tmp_path, monkeypatch):
    """The process that writes beside training removes an old checkpoint; so may the next save."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        (folder / name).touch()
    unlink = os.unlink

    def other_was_first(path, **rest):
        unlink(path, **rest)
        unlink(path, **rest)  # as if the other process had removed it before

    monkeypatch.setattr(os, "unlink", other_was_first)
    remove_rest(folder)
    assert not folder.exists()


def test_what_cannot_be_removed_is_named_whole(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()

    def refused(path, **rest):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(OSError) as caught:
        remove_rest(tmp_path / "folder")
    assert caught.value.filename == str(tmp_path / "folder" / "file")


def test_a_circle_of_links_is_told_by_a_command(tmp_path, capsys):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    assert run_command("", lambda parser: None, lambda _: circle.resolve(), arguments=[]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {circle}") and "go round in a circle" in told


def test_a_run_that_diverges_is_told_without_a_stack_and_a_fault_of_ours_is_not():
    assert told_in_words(FloatingPointError("step 3: not finite")) == "step 3: not finite"
    assert told_in_words(ValueError("a bug")) is None
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")
    assert told_in_words(full) == in_words(full)

"""Moving to the archive loses nothing, also when it is killed half way."""

from __future__ import annotations

import os

import pytest

from equilibrium_mcore.files.archive import move_to_archive

NAMES = ("metrics.jsonl", "checkpoints", "absent")


def fill(folder, text):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step").write_text(text)
    (folder / "metrics.jsonl").write_text(text)


def held(place):
    return (place / "metrics.jsonl").read_text() + (place / "checkpoints" / "step").read_text()


def test_each_time_has_a_number_and_others_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for number, text in enumerate("abc", start=1):
        fill(tmp_path, text)
        assert move_to_archive(tmp_path, NAMES) == tmp_path / "archive" / str(number)
    assert move_to_archive(tmp_path, NAMES) is None
    assert [held(tmp_path / "archive" / number) for number in "123"] == ["aa", "bb", "cc"]
    assert sorted(os.listdir(tmp_path)) == ["archive", "notes.txt"]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_in_between_is_finished_in_one_place(tmp_path, monkeypatch, moved):
    fill(tmp_path, "a")
    rename, calls = os.replace, []

    def killed(source, target):
        calls.append(source)
        if len(calls) > moved:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        move_to_archive(tmp_path, NAMES)
    monkeypatch.undo()
    if moved == 2:  # everything but the last rename was done, and a run began since
        fill(tmp_path, "b")
    move_to_archive(tmp_path, NAMES)
    assert held(tmp_path / "archive" / "1") == "aa"
    assert sorted(os.listdir(tmp_path / "archive")) == ["1", "2"][: 2 if moved == 2 else 1]

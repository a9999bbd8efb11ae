"""A log of JSON lines: whole lines, also after a kill, and while it is read."""

from __future__ import annotations

import json
import os

import pytest

from equilibrium_mcore.files.json_lines import JsonLinesLog, json_line, read_log


def test_what_is_appended_is_read_in_order_at_once(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with JsonLinesLog(path) as log:
        for step in range(3):
            log.append({"step": step, "text": "é"})
            assert [record["step"] for record in read_log(path)] == list(range(step + 1))
    with JsonLinesLog(path) as log:
        log.append({"step": 3}, durable=True)
    assert [record["step"] for record in read_log(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", ['{"step": 2', '{"step": 2}', '{"text": "é'.encode()[:-1]])
def test_a_cut_line_is_not_read_and_goes_before_the_next_one(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    rest = cut if isinstance(cut, bytes) else cut.encode()
    path.write_bytes(b'{"step": 1}\n' + rest)
    whole = [1, 2] if rest.endswith(b"}") else [1]
    assert [record["step"] for record in read_log(path)] == whole
    with JsonLinesLog(path) as log:
        log.append({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("line", ["[1]", "{", '{"kind": "a"}', "\\udcff"])
def test_a_bad_line_before_the_last_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 3: no record of this log"):
        list(read_log(path, keys=("step",)))


def test_a_disk_that_takes_a_part_of_a_line_is_an_error(tmp_path, monkeypatch):
    with JsonLinesLog(tmp_path / "log.jsonl") as log:
        stream = log._stream
        monkeypatch.setattr(log, "_stream", type("Full", (), {"write": lambda _, line: 3})())
        with pytest.raises(OSError, match=r"No space left.*log\.jsonl"):
            log.append({"step": 1})
        monkeypatch.setattr(log, "_stream", stream)


def test_text_is_utf_8_and_a_name_that_is_none_is_escaped():
    name = os.fsdecode(b"caf\xe9")
    assert json_line({"text": "é"}) == '{"text": "é"}\n'.encode()
    assert json.loads(json_line({"path": name}, ascii_only=True)) == {"path": name}
    with pytest.raises(ValueError):
        json_line({"path": name})
    with pytest.raises(ValueError):
        json_line({"loss": float("nan")})

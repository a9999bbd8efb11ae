"""One parser of JSON lines: what is wrong is said alike, whatever becomes of the line."""

from __future__ import annotations

import gzip
import math

import pytest

from equilibrium_mcore.data.jsonl import parse_lines, parse_object, read_objects, texts_of

BAD = {
    b'{"text": "cut': "not JSON (Unterminated string",
    b'{"text": "\xff"}': "not UTF-8 (byte 10 of the line)",
    b"[1]": "not a JSON object but an array",
    b"null": "not a JSON object but null",
    b"NaN": "not a JSON object but a number",
    b"[" * 100_000: "not usable JSON",
}


@pytest.mark.parametrize("line", BAD, ids=BAD.values())
def test_it_is_said_what_is_wrong_with_a_line(line):
    for strict in (False, True):
        with pytest.raises(ValueError) as error:
            parse_object(line, strict=strict)
        assert str(error.value).startswith(BAD[line])
    bad = []
    assert parse_lines(line, ["text"], bad) == ([], 1)
    assert bad[0][0] == 1 and bad[0][1].startswith(BAD[line])


@pytest.mark.parametrize("line", [b'{"a": NaN}', b'{"a": "\\ud800"}'])
def test_what_pythons_parser_alone_takes_is_refused_where_that_matters(line):
    value = parse_object(line)["a"]
    assert value == "\ud800" or math.isnan(value)
    with pytest.raises(ValueError, match="write the line with a JSON library"):
        parse_object(line, strict=True)


def test_texts_are_strings_that_are_text():
    assert texts_of({"a": "x", "b": "é"}, ["b", "a"]) == ["é", "x"]
    for record, match in (
        ({"b": "x"}, "no key 'a'; it has 'b'"),
        ({}, "it has no key"),
        ({"a": 1}, "'a' is not a string but a number"),
        ({"a": "\ud800"}, "half of a surrogate pair"),
    ):
        with pytest.raises(ValueError, match=match):
            texts_of(record, ["a"])


def test_objects_of_a_file_are_numbered_by_line_and_blank_lines_are_none(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\n\n \r\n{"a": 2}\n{\n'))
    found = read_objects(path)
    assert [next(found), next(found)] == [(1, {"a": 1}), (4, {"a": 2})]
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 5: not JSON"):
        next(found)
    with pytest.raises(FileNotFoundError, match="give a JSONL file"):
        next(read_objects(tmp_path / "absent.jsonl"))

"""Lines of JSON as text to train on has them: one parser, and in words what is wrong with a line.

What becomes of a bad line is for the caller: it may raise, count, or collect. What a run appends to
while it trains (`metrics.jsonl`, `ledger.jsonl`) is read by `equilibrium_mcore.files.json_lines`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from equilibrium_mcore.data.compression import refuse_pipe
from equilibrium_mcore.data.text_files import lines_of


def parse_object(line: bytes, *, strict: bool = False) -> dict[str, Any]:
    """The object of a line. Raises ValueError that says what is wrong with the line.

    Python's own parser, which is slow and says why, is asked where the fast one refuses. It also
    takes a little more (NaN, half of a surrogate pair): not if `strict`.
    """
    try:
        record = orjson.loads(line)
    except ValueError:
        record = _parse_slowly(line)
        if strict and isinstance(record, dict):
            raise ValueError(
                "not JSON that can be used; write the line with a JSON library"
            ) from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {_json_name(record)}")
    return record


def texts_of(record: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The texts under `keys`. Raises ValueError for a key that is missing, or holds no text."""
    texts = []
    for key in keys:
        if key not in record:
            held = ", ".join(map(repr, list(record)[:8])) or "no key"
            raise ValueError(f"no key {key!r}; it has {held}")
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f"{key!r} is not a string but {_json_name(text)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{key!r} holds half of a surrogate pair, which is no text") from None
        texts.append(text)
    return texts


def parse_lines(
    data: bytes, keys: Sequence[str], bad: list[tuple[int, str]]
) -> tuple[list[tuple[str, ...]], int]:
    """The texts under `keys` of every line of `data`, and the number of lines.

    Blank lines are no documents. A line that is none either is noted in `bad` with its number,
    from 1, and the reason.
    """
    documents: list[tuple[str, ...]] = []
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
            texts = tuple([record[key] for key in keys])
            if set(map(type, texts)) == {str}:
                documents.append(texts)
                continue
        except (ValueError, KeyError, TypeError, IndexError):
            pass
        # The slow way knows the reason; and it decides, where the two parsers differ.
        if not line.strip():
            continue
        try:
            documents.append(tuple(texts_of(parse_object(line), keys)))
        except ValueError as error:
            bad.append((number, str(error)))
    return documents, len(lines)


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file, plain, .gz or .zst; blank lines are left out.

    Raises FileNotFoundError, and ValueError that names the line which is no JSON object.
    """
    refuse_pipe(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a JSONL file, plain, .gz or .zst")
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            record = parse_object(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        yield number, record


def read_texts(path: Path, names: Sequence[str]) -> Iterator[str]:
    """The texts under `names` of each line; a value is a text, or a list of texts (choices).

    Raises ValueError for a line that has none of them, or something else under one.
    """
    for number, record in read_objects(path):
        values = [record[name] for name in names if name in record]
        texts = [v for value in values for v in (value if isinstance(value, list) else [value])]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path}, line {number}: no text under {', '.join(names)}; it has "
                f"{', '.join(map(repr, record)) or 'no keys'}; name the keys that hold text"
            )
        yield from texts


def _parse_slowly(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not usable JSON ({error})") from None


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")

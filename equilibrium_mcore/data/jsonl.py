"""Lines of JSON to texts, and in words what is wrong with a line."""

from __future__ import annotations

import json
from collections.abc import Sequence

import orjson

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
            documents.append(tuple(parse_line(line, keys)))
        except ValueError as error:
            bad.append((number, str(error)))
    return documents, len(lines)


def parse_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts under `keys`. Raises ValueError that says what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not usable JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {_json_name(record)}")
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


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")

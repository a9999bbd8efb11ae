"""From a row to a document: a text, or a conversation, preference or prompt in one form.

    text           the text itself
    conversation   {"messages": [{"role", "content"}, ...]}
    preference     {"prompt": [turns], "chosen": [turns], "rejected": [turns]}
    prompt         {"prompt": [turns], "truth": any value, where the mixture names it}

Roles are system, user, assistant and tool. Filters see the joined text of the turns.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from equilibrium_mcore.config.mixture import DatasetConfig, Kind
from equilibrium_mcore.data.chat.segments import ROLE_NAMES
from equilibrium_mcore.verification.answers import find_answer

LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):", re.ASCII)

Turns = list[dict[str, str]]
TRUTH = "truth"  # of a record: no text that filters see


class RowError(ValueError):
    """The row is not what the mixture says it is; the text says how."""


class SkippedRowError(Exception):
    """The row is right and still no example; its text is the reason that is counted."""


class Document(NamedTuple):
    """A text, and in posttrain phases the record that is written."""

    text: str
    record: dict[str, Any] | None = None


def to_document(kind: Kind, dataset: DatasetConfig, row: Mapping[str, Any]) -> Document:
    """The document of a row. Raises RowError, and SkippedRowError where there is no example."""
    if kind == "text":
        return Document(_text(dataset, row))
    record = _RECORDS[kind](dataset, row)
    turns = (turn for key, part in record.items() if key != TRUTH for turn in part)
    return Document("\n\n".join(turn["content"] for turn in turns), record)


def field_of(row: Mapping[str, Any], path: str) -> Any:
    """The value at `a.b.c`; a field whose own name has dots comes first. Raises RowError."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, str) and value.startswith("{"):
            value = _parsed(value)  # metadata that a dataset keeps as JSON text
        if not isinstance(value, Mapping) or part not in value:
            held = ", ".join(map(repr, list(row)[:12])) or "no field"
            raise RowError(f"no field {path!r}; the row has {held}")
        value = value[part]
    return value


def number_of(row: Mapping[str, Any], path: str) -> float:
    """The number at `path`. Raises RowError when it is missing or none."""
    value = field_of(row, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RowError(f"field {path!r} holds {value!r:.60}, and sampling needs a number")
    return float(value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---------------------------------------------------------------------------------------- text


def _text(dataset: DatasetConfig, row: Mapping[str, Any]) -> str:
    if dataset.text_template is not None:
        return _fill(dataset.text_template, row)
    if dataset.columns.messages:
        return "\n\n".join(
            f"{LABELS[turn['role']]}: {turn['content']}" for turn in _turns(dataset, row)
        )
    return _string(row, dataset.text_field)


def _fill(template: str, row: Mapping[str, Any]) -> str:
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if name:
            pieces.append(_string(row, name))
    return "".join(pieces)


def _string(row: Mapping[str, Any], path: str) -> str:
    value = field_of(row, path)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"field {path!r} is not text but {type(value).__name__} ({value!r:.60})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"field {path!r} holds half of a surrogate pair, which is no text") from None
    return value


# --------------------------------------------------------------------------------------- turns


def _turns(dataset: DatasetConfig, row: Mapping[str, Any]) -> Turns:
    columns = dataset.columns
    turns = _as_turns(field_of(row, str(columns.messages)), str(columns.messages))
    system = _string(row, columns.system) if columns.system else ""
    if system and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _as_turns(value: Any, name: str, role: str = "user") -> Turns:
    """A list of turns, a transcript, or plain text said by `role`."""
    if isinstance(value, str):
        cuts = list(_TRANSCRIPT.finditer(value))
        if not cuts or cuts[0].start() > 0:
            return [{"role": role, "content": value}]
        ends = [cut.start() for cut in cuts[1:]] + [len(value)]
        return [
            {"role": ROLE_NAMES[cut[1].lower()], "content": value[cut.end() : end].strip()}
            for cut, end in zip(cuts, ends, strict=True)
        ]
    if not isinstance(value, list) or not value:
        raise RowError(f"field {name!r} holds {value!r:.60}, and turns are a list or text")
    return [_turn(turn, name) for turn in value]


def _turn(turn: Any, name: str) -> dict[str, str]:
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if isinstance(turn, Mapping) and role_key in turn and content_key in turn:
            role, content = turn[role_key], turn[content_key]
            if role not in ROLE_NAMES:
                raise RowError(f"field {name!r}: role {role!r} is none of {', '.join(ROLE_NAMES)}")
            if not isinstance(content, str):
                raise RowError(f"field {name!r}: a turn's {content_key} is not text")
            return {"role": ROLE_NAMES[role], "content": content}
    raise RowError(
        f"field {name!r}: a turn is {turn!r:.80}; it needs role and content, or from and value"
    )


# ------------------------------------------------------------------------------------- records


def _conversation(dataset: DatasetConfig, row: Mapping[str, Any]) -> dict[str, Turns]:
    columns = dataset.columns
    if columns.messages:
        turns = _turns(dataset, row)
    else:
        turns = _prompt(dataset, row)
        turns.append({"role": "assistant", "content": _string(row, str(columns.response))})
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise SkippedRowError("no answer of the assistant")
    return {"messages": turns}


def _prompt(dataset: DatasetConfig, row: Mapping[str, Any]) -> Turns:
    columns = dataset.columns
    turns = _as_turns(field_of(row, str(columns.prompt)), str(columns.prompt))
    context = _string(row, columns.context).strip() if columns.context else ""
    if context:
        *before, last = turns
        turns = [*before, {**last, "content": f"{last['content']}\n\n{context}"}]
    system = _string(row, columns.system) if columns.system else ""
    return [{"role": "system", "content": system}, *turns] if system else turns


def _preference(dataset: DatasetConfig, row: Mapping[str, Any]) -> dict[str, Turns]:
    columns = dataset.columns
    if columns.responses:
        preferred = field_of(row, str(columns.preferred))
        if preferred not in (0, 1):
            raise RowError(f"field {columns.preferred!r} holds {preferred!r}, and 0 or 1 is needed")
        answers = [_string(row, name) for name in columns.responses]
        better, worse = answers[int(preferred)], answers[1 - int(preferred)]
        chosen, rejected = _answer(better), _answer(worse)
        prompt = _prompt(dataset, row)
    else:
        chosen = _as_turns(field_of(row, str(columns.chosen)), str(columns.chosen), "assistant")
        rejected = _as_turns(
            field_of(row, str(columns.rejected)), str(columns.rejected), "assistant"
        )
        shared = _shared_turns(chosen, rejected)
        prompt = chosen[:shared]
        if not prompt and columns.prompt:
            prompt = _prompt(dataset, row)
        chosen, rejected = chosen[shared:], rejected[shared:]
    if chosen == rejected:
        raise SkippedRowError("chosen and rejected are the same")
    if not prompt:
        raise RowError("there is no prompt: name its field in columns.prompt")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared_turns(chosen: Turns, rejected: Turns) -> int:
    """How many turns both begin with; the last one of each is its answer."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    return count


def _answer(text: str) -> Turns:
    return [{"role": "assistant", "content": text}]


def _prompt_only(dataset: DatasetConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    truth = {} if dataset.columns.truth is None else {TRUTH: _truth(dataset, row)}
    return {"prompt": _asked(dataset, row), **truth}


def _truth(dataset: DatasetConfig, row: Mapping[str, Any]) -> Any:
    """What an answer is judged by, as a reward takes it."""
    columns = dataset.columns
    value = field_of(row, str(columns.truth))
    if columns.truth_place == "whole":
        return value
    if not isinstance(value, str):
        raise RowError(f"field {columns.truth!r} holds {value!r:.60}, and is no text")
    found = find_answer(value, places=[columns.truth_place])
    if found is None:
        raise SkippedRowError(f"no true answer in the place {columns.truth_place}")
    return found.text


def _asked(dataset: DatasetConfig, row: Mapping[str, Any]) -> Turns:
    if dataset.columns.prompt:
        return _prompt(dataset, row)
    turns = _turns(dataset, row)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise SkippedRowError("no turn of a user")
    return turns


_RECORDS = {"conversation": _conversation, "preference": _preference, "prompt": _prompt_only}

"""What tools/score_answers.py does: records to examples, their scores, a table, a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.rewards import RewardsConfig, parse_rewards, reward_from_text
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.files.json_lines import json_line
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.files.whole import whole_file
from equilibrium_mcore.verification.scored import VERDICTS, Example, Scored, count_verdicts
from equilibrium_mcore.verification.scorer import Scorer, TooManyErrorsError

BATCH = 512

Record = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Fields:
    """The keys of a record."""

    text: str = "text"
    answer: str = "answer"
    truth: str = "truth"
    prompt: str = "prompt"
    tokens: str = "tokens"


@dataclass(frozen=True)
class Report:
    """What is printed, and why it stopped if it did."""

    text: str
    stopped: str = ""


def read_config(path: Path | None, texts: Sequence[str]) -> RewardsConfig:
    """The rewards of a YAML file (a mapping with `rewards:`), then those of a command line.

    Raises ConfigError for what cannot be used.
    """
    values = dict(read_mapping(path)) if path is not None else {"rewards": []}
    if not isinstance(values.get("rewards"), list):
        raise ConfigError("rewards: must be a list of rewards", source=path)
    values["rewards"] = [*values["rewards"], *(reward_from_text(text) for text in texts)]
    if not values["rewards"]:
        raise ConfigError(
            "no reward is given: add --reward type=math_answer, or --rewards FILE.yaml",
            source="the command line",
        )
    return parse_rewards(values, source=path)


def score_records(
    records: Iterable[Record],
    config: RewardsConfig,
    *,
    source: Path,
    fields: Fields = Fields(),
    output: Path | None = None,
    examples: int = 2,
) -> Report:
    """Score every record; write a line for each to `output`.

    Stops at too many errors, with what was scored so far. Raises ValueError that names the record
    that cannot be used.
    """
    pairs = _examples(records, fields, source)
    scored: list[tuple[int, Scored]] = []
    stopped = ""
    with Scorer(config) as scorer, _lines(output) as write:
        for batch in batched(pairs, BATCH):
            try:
                found = scorer.score([example for _, example in batch])
            except TooManyErrorsError as error:
                found, stopped = error.scored, f"stopped after line {batch[-1][0]}: {error}"
            for (number, _), one in zip(batch, found, strict=True):
                scored.append((number, one))
                write({"line": number, **one.as_dict()})
            if stopped:
                break
        if not scored:
            raise ValueError(f"{source} has no records")
        notes = scorer.notes
    return Report(_report(scored, notes, examples), stopped)


def _examples(records: Iterable[Record], fields: Fields, source: Path) -> Iterator[Record]:
    for number, record in records:
        text, answer = record.get(fields.text), record.get(fields.answer)
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        if text is None and answer is None:
            held = ", ".join(map(repr, record)) or "no key"
            raise ValueError(
                f"{source}, line {number}: neither {fields.text!r} (the whole text) nor "
                f"{fields.answer!r} (the answer alone) is there; it has {held}"
            )
        for key, value in ((fields.text, text), (fields.answer, answer)):
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"{source}, line {number}: {key!r} is no text but {value!r}")
        yield (
            number,
            Example(
                text=text if text is not None else answer,
                truth=record.get(fields.truth),
                prompt=str(record.get(fields.prompt) or ""),
                key=f"line {number}",
                answer=answer if text is None else None,
                length=_whole_number(record.get(fields.tokens)),
            ),
        )


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@contextlib.contextmanager
def _lines(path: Path | None) -> Iterator[Any]:
    """A function that writes a record; to nowhere without a path."""
    if path is None:
        yield lambda record: None
        return
    with whole_file(path, "wb") as stream:
        yield lambda record: stream.write(json_line(record, ascii_only=True))


def _report(scored: Sequence[tuple[int, Scored]], notes: Sequence[str], examples: int) -> str:
    results = [one for _, one in scored]
    counts = count_verdicts(results)
    rows = []
    for name in (*results[0].parts, "all"):
        values = [one.reward if name == "all" else one.parts[name] for one in results]
        given = counts.get(name)
        cells = [given[verdict] for verdict in VERDICTS] if given else ["-"] * len(VERDICTS)
        rows.append((name, *cells, f"{sum(values) / len(values):.4f}"))
    head = ("reward", *VERDICTS, "mean value")
    blocks = [*notes, terminal_table(head, rows, align="lr")]
    for verdict in VERDICTS[1:]:
        shown = [pair for pair in scored if pair[1].verdict == verdict][:examples]
        blocks += [_line(number, one, verdict) for number, one in shown]
    return "\n".join(blocks) + "\n"


def _line(number: int, one: Scored, verdict: str) -> str:
    reasons = [
        f"{name}: {part.reason}"
        for name, part in one.details.items()
        if part.verdict == verdict and part.reason
    ]
    answer = f" {one.answer_text!r}" if one.answer_text else ""
    return f"line {number}: {verdict}{answer}; {'; '.join(reasons)}"

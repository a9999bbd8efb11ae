"""`ledger.jsonl`: enough of a run's ledger to say later which documents any step was trained on.

    {"kind": "start", "step", "samples", "settings", "state", "left_out"}    a process starts here
    {"kind": "checkpoint", "step", "samples", "state"}           a checkpoint is in place

`state` is the ledger's after `step` steps; that of a checkpoint leaves out which data the names
stand for, which the start before it has. Where a run was killed and resumed from an earlier
checkpoint, or went back by itself, the later lines count. `left_out` are samples that the run
passes over, as [first, count] by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.data import SourceConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.indexed_files import read_header
from equilibrium_mcore.data.ledger.ledger import Ledger, SamplePlan, check_version
from equilibrium_mcore.data.ledger.source import SourceDocuments
from equilibrium_mcore.data.left_out import LeftOut, PassingCursor
from equilibrium_mcore.data.open_files import OpenFiles
from equilibrium_mcore.files.archive import move_to_archive
from equilibrium_mcore.files.json_lines import JsonLinesLog, read_log

LEDGER_FILE = "ledger.jsonl"


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What the order of a run's documents follows from, and how its tokens are made text."""
    training, data = config.training, config.data
    tokenizer = data.tokenizer.model_dump(mode="json")
    return {
        "steps": training.steps,
        "global_batch_size": training.global_batch_size,
        "sequence_length": training.sequence_length,
        "packing": data.packing,
        "document_multiple": data.padding_multiple,
        "seed": training.seed,
        "split": data.split,
        "tokenizer": {**tokenizer, "model": str(Path(data.tokenizer.model).absolute())},
        "sources": [
            {
                "name": source.name,
                "prefix": str(Path(source.prefix).absolute()),
                "weight": source.weight,
            }
            for source in data.sources
        ],
    }


# ------------------------------------------------------------------------------------ writing


class LedgerFile:
    """Appends to a run's `ledger.jsonl`. One rank."""

    def __init__(self, run_directory: Path, *, goes_on: bool) -> None:
        """A run that starts from scratch moves an older file to the folder's archive."""
        self.path = Path(run_directory) / LEDGER_FILE
        if self.path.exists() and not goes_on:
            move_to_archive(self.path.parent, [self.path.name])

    def start(
        self,
        *,
        step: int,
        samples: int,
        settings: dict,
        state: dict,
        left_out: Sequence[Sequence[int]] = (),
    ) -> None:
        """A process begins after `step` steps and `samples` samples."""
        self._append(
            {
                "kind": "start",
                "step": step,
                "samples": samples,
                "settings": settings,
                "state": state,
                "left_out": list(left_out),
            }
        )

    def checkpoint(self, *, step: int, samples: int, state: dict) -> None:
        """A checkpoint holds `state`."""
        short = {key: value for key, value in state.items() if key != "sources"}
        self._append({"kind": "checkpoint", "step": step, "samples": samples, "state": short})

    def _append(self, record: dict) -> None:
        with JsonLinesLog(self.path) as log:  # seldom: a line for a start, and for a checkpoint
            log.append(record, durable=True)


# ------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Mark:
    """A known state: after `step` steps and `samples` samples."""

    step: int
    samples: int
    state: dict[str, Any]


@dataclass(frozen=True)
class StepInterval:
    """Steps under the same settings: from the first mark's on, up to the next segment."""

    settings: dict[str, Any]
    marks: tuple[Mark, ...]
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def first(self) -> Mark:
        return self.marks[0]

    def mark_before(self, step: int) -> Mark:
        """The last known state after at most `step` steps."""
        return next(mark for mark in reversed(self.marks) if mark.step <= step)


def read_segments(run_directory: Path) -> list[StepInterval]:
    """The run's segments in order, without steps that were lost and trained again.

    Raises FileNotFoundError where the run has no ledger, ValueError for a broken line before the
    last, and ConfigError for a state of another version.
    """
    path = Path(run_directory) / LEDGER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: name the output_directory of a run with data.order=ledger"
        )
    segments: list[StepInterval] = []
    for record in read_log(path, keys=("kind", "step", "samples", "state")):
        step = record["step"]
        check_version(record["state"])
        if record["kind"] == "start":
            segments = _cut(segments, step)
            mark = Mark(step, record["samples"], record["state"])
            left_out = LeftOut(record.get("left_out", ()))
            segments.append(StepInterval(record["settings"], (mark,), left_out))
        elif segments:
            last = segments[-1]
            state = {**last.first.state, **record["state"]}
            mark = Mark(step, record["samples"], state)
            segments[-1] = replace(last, marks=(*last.marks, mark))
    if not segments:
        raise ValueError(f"{path} holds no start of a run: it is empty or damaged")
    return segments


def _cut(segments: list[StepInterval], step: int) -> list[StepInterval]:
    """What is left when the run resumes after `step`: later steps are lost."""
    kept = [segment for segment in segments if segment.first.step < step]
    return [
        replace(segment, marks=tuple(mark for mark in segment.marks if mark.step <= step))
        for segment in kept
    ]


# ------------------------------------------------------------------------------------ replaying


def segment_of(segments: list[StepInterval], step: int) -> StepInterval:
    """The segment in which step `step` (the first is 1) was trained, or will be.

    Raises ConfigError for a step outside of the run.
    """
    last = segments[-1].settings["steps"]
    if not segments[0].first.step < step <= last:
        raise ConfigError(
            f"--step {step}: this run's ledger has the steps {segments[0].first.step + 1} to {last}"
        )
    return next(segment for segment in reversed(segments) if segment.first.step < step)


def open_sources(settings: dict[str, Any]) -> list[SourceDocuments]:
    """The training documents that a segment read from.

    Raises ConfigError with every source whose files are gone or damaged.
    """
    opened, problems, files = [], [], OpenFiles()
    for values in settings["sources"]:
        source = SourceConfig(
            name=values["name"], prefix=Path(values["prefix"]), weight=values["weight"]
        )
        try:
            opened.append(
                SourceDocuments(
                    source,
                    read_header(source.prefix),
                    split=settings["split"],
                    part="train",
                    seed=settings["seed"],
                    files=files,
                )
            )
        except (OSError, ValueError) as error:
            problems.append(f"data source {source.name!r}: {error}")
    if problems:
        raise ConfigError(problems, source="replaying the ledger")
    return opened


def ledger_behind(segment: StepInterval, step: int) -> PassingCursor:
    """The segment's ledger after `step` steps, replayed from the last state that is known.

    Raises ConfigError where the data is gone or was made again since.
    """
    mark = segment.mark_before(step)
    cursor = _cursor_at(segment, mark)
    cursor.skip((step - mark.step) * segment.settings["global_batch_size"])
    return cursor


def _cursor_at(segment: StepInterval, mark: Mark) -> PassingCursor:
    settings, left_out = segment.settings, segment.left_out
    ledger = Ledger(
        open_sources(settings),
        [source["weight"] for source in settings["sources"]],
        sequence_length=settings["sequence_length"],
        document_multiple=settings["document_multiple"],
        state=mark.state,
    )
    return PassingCursor(ledger, left_out, position=left_out.passed(mark.samples))


def plans_of(segment: StepInterval, step: int) -> tuple[Ledger, list[SamplePlan]]:
    """The samples of step `step`, in the order of the global batch, and the ledger after them."""
    cursor = ledger_behind(segment, step - 1)
    plans = [cursor.take() for _ in range(segment.settings["global_batch_size"])]
    return cursor.cursor, plans


def plans_at(
    segments: list[StepInterval], position: int, count: int
) -> tuple[StepInterval, Ledger, list[SamplePlan]]:
    """The samples at positions of the data, trained on or left out, and the ledger after them.

    Raises ConfigError for a position before the run.
    """
    for segment in reversed(segments):
        for mark in reversed(segment.marks):
            passed = segment.left_out.passed(mark.samples)
            if passed <= position:
                ledger = _cursor_at(segment, mark).cursor
                ledger.skip(position - passed)
                return segment, ledger, [ledger.take() for _ in range(count)]
    raise ConfigError(f"--position {position}: this run's ledger begins after it")

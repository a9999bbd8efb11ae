"""How far a preprocessing run is, so that a killed one can be resumed.

The journal names what the run is made of (inputs, tokenizer, options) and up to where its temporary
files are whole. It is replaced as a whole, after those files went to disk. A run that finds one
resumes from there if it is made of the same; if it is not, it says what differs and stops, since
hours of work may lie there. The last entry says that all is whole and only the names are missing.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equilibrium_mcore.corpus.indexed_writer import WriterState
from equilibrium_mcore.data.inputs import Input, Position
from equilibrium_mcore.files.errors import reason
from equilibrium_mcore.files.whole import TEMPORARY, write_whole

FORMAT_VERSION = 1
DIFFERENCES_SHOWN = 4


@dataclass(frozen=True)
class Savepoint:
    """A point after a whole range.

    Attributes:
        position: where the next range begins.
        lines: read of each input so far, by number of the input.
        skipped_lines: bad lines left out.
        writers: the state of each key's files.
        whole: all datasets are written and about to get their names.
    """

    position: Position = (0, 0)
    lines: dict[int, int] = field(default_factory=dict)
    skipped_lines: int = 0
    writers: dict[str, WriterState] = field(default_factory=dict)
    whole: bool = False


def describe_run(
    inputs: Sequence[Input], *, tokenizer: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """What has to be the same for a run to resume, by the name that a message gives it."""
    facts: dict[str, Any] = {f"tokenizer's {name}": value for name, value in tokenizer.items()}
    facts |= options
    facts["number of inputs"] = len(inputs)
    for item in inputs:
        facts[str(item.path)] = [item.size, item.modified_ns]
    return facts


class Journal:
    """The journal of one run."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.facts = facts

    def read(self) -> Savepoint | None:
        """Progress of a dead run, or None.

        Raises ValueError if there is one of a run that was made of something else.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            facts = content["run"]
            if content["format_version"] != FORMAT_VERSION:
                facts = {**facts, "journal's version": content["format_version"]}
            progress = _progress_from(content["progress"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a journal of this tool ({reason(error)}). Remove it, or start "
                f"from the beginning with --restart"
            ) from None
        differences = list(_differences(facts, self.facts))
        if differences:
            more = len(differences) - DIFFERENCES_SHOWN
            shown = "; ".join(differences[:DIFFERENCES_SHOWN])
            raise ValueError(
                f"{self.path} is what a stopped run left, which was made of something else: "
                f"{shown}{f'; and {more:,} more' if more > 0 else ''}. Go back to what it was, "
                f"choose another --output-prefix, or start from the beginning with --restart"
            )
        return progress

    def write(self, progress: Savepoint) -> None:
        """Replace the journal; what it speaks of must be on disk."""
        content = {
            "format_version": FORMAT_VERSION,
            "run": self.facts,
            "progress": asdict(progress),
        }
        write_whole(self.path, json.dumps(content))

    def remove(self) -> None:
        """The run is over. A kill while the journal was written may have left a temporary file."""
        self.path.unlink(missing_ok=True)
        for path in self.path.parent.glob(f".{glob.escape(self.path.name)}.*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def _progress_from(content: dict[str, Any]) -> Savepoint:
    number, offset = content["position"]
    return Savepoint(
        position=(number, offset),
        lines={int(number): lines for number, lines in content["lines"].items()},
        skipped_lines=content["skipped_lines"],
        writers={key: _writer_state(state) for key, state in content["writers"].items()},
        whole=content.get("whole", False),
    )


def _writer_state(content: dict[str, Any]) -> WriterState:
    return WriterState(**{**content, "blocks": tuple(content.get("blocks", ()))})


def _differences(before: dict[str, Any], now: dict[str, Any]):
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old or new, list):
            what = "changed" if old and new else "is new" if new else "is not an input now"
            yield f"{name} {what}"
        else:
            yield f"{name} was {old!r} and is {new!r}"

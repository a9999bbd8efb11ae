"""What the checks found: verdicts with figures, as a table for people and as JSON."""

from __future__ import annotations

import os
import textwrap
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.files.whole import write_whole


class CheckVerdict(StrEnum):
    """How a check ended."""

    PASS = "PASS"
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True)
class Check:
    """One check's outcome.

    Attributes:
        name: what `--only` calls it.
        verdict: PASS, FAIL or SKIPPED.
        summary: one line: what was seen against what was allowed, or why it was skipped.
        details: lines printed below the name while the ladder runs.
        figures: plain values for the JSON.
        seconds: how long it took.
    """

    name: str
    verdict: CheckVerdict
    summary: str
    details: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def text(self) -> str:
        """The block printed when the check is done."""
        lines = [f"{self.verdict:<8}{self.name}: {self.summary}"]
        return "\n".join(lines + [f"        {line}" for line in self.details])


def judged(name: str, problems: list[str], good: str, **more: Any) -> Check:
    """FAIL with the problems, or PASS with the line `good` where there are none."""
    if not problems:
        return Check(name, CheckVerdict.PASS, good, **more)
    shown = "; ".join(problems[:3])
    if len(problems) > 3:
        shown += f"; and {len(problems) - 3} more"
    return Check(name, CheckVerdict.FAIL, shown, **more)


def skipped(name: str, why: str) -> Check:
    """A check that this host, config or data does not allow."""
    return Check(name, CheckVerdict.SKIPPED, why)


@dataclass
class SanityReport:
    """All checks of one ladder, and what was changed in the config to run them."""

    run: str
    changes: list[str]
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.verdict is CheckVerdict.FAIL]

    def named(self, name: str) -> Check:
        """The check called `name`. Raises KeyError where it did not run."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r} ran; these did: {[c.name for c in self.checks]}")

    def table(self) -> str:
        """The verdict table."""
        width = max(len(check.name) for check in self.checks)
        room = 99 - width - 17
        rows = [
            (
                check.name,
                check.verdict,
                f"{check.seconds:.1f}",
                textwrap.shorten(check.summary, room, placeholder=" ..."),
            )
            for check in self.checks
        ]
        head = ("check", "verdict", "seconds", "finding")
        lines = [terminal_table(head, rows, align="llrl")]
        seconds = sum(check.seconds for check in self.checks)
        count = {v: sum(check.verdict is v for check in self.checks) for v in CheckVerdict}
        lines.append(
            f"{count[CheckVerdict.PASS]} passed, {count[CheckVerdict.FAIL]} failed, "
            f"{count[CheckVerdict.SKIPPED]} skipped in {seconds:.0f} s"
        )
        return "\n".join(lines)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, whole or not at all."""
        import json

        values = {
            "run": self.run,
            "passed": not self.failed,
            "changes": self.changes,
            "checks": [asdict(check) for check in self.checks],
        }
        write_whole(path, json.dumps(values, indent=2) + "\n")

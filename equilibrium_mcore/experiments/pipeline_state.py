"""What a pipeline has done, in one JSON file in its folder, and why a step would run again."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import shipped
from equilibrium_mcore.experiments.fingerprints import fingerprint
from equilibrium_mcore.experiments.pipeline import Pipeline, Step
from equilibrium_mcore.files.errors import reason
from equilibrium_mcore.files.exclusive import exclusive
from equilibrium_mcore.files.whole import write_whole

STATE_FILE = "pipeline.json"


@dataclass
class State:
    """The record of each step that was begun: its command, what its inputs were, whether done."""

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, pipeline: Pipeline) -> State:
        """The state in the pipeline's folder. Raises ConfigError for a file that is none."""
        path = pipeline.folder / STATE_FILE
        if not path.exists():
            return cls(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            name, steps = values["pipeline"], dict(values["steps"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read as the state of a pipeline ({reason(error)}): move it "
                "away, and every step runs again"
            ) from None
        if name != pipeline.name:
            raise ConfigError(
                f"{path} is the state of the pipeline {name!r}, not of {pipeline.name!r}: give "
                "this one another folder (folder=...)"
            )
        return cls(path, steps)

    def write(self, pipeline: Pipeline, step: Step, record: dict[str, Any]) -> None:
        """Keep the record of a step; the file is whole at any time."""
        self.steps[step.name] = record
        values = {"pipeline": pipeline.name, "steps": self.steps}
        write_whole(self.path, json.dumps(values, indent=2) + "\n")

    def outdated(self, step: Step, record: dict[str, Any]) -> list[Path]:
        """Places of the step whose content it wrote from another command or other inputs."""
        before = self.steps.get(step.name)
        if before is None or not _differences(before, record):
            return []
        written = set(before.get("outputs", {}).values())
        return [place for place in step.outputs.values() if str(place) in written]

    def reason(self, step: Step, record: dict[str, Any]) -> str | None:
        """Why the step must run; None where it was done with these inputs and its outputs stay."""
        before = self.steps.get(step.name)
        if before is None:
            return "it never ran"
        if differences := _differences(before, record):
            return "; ".join(differences)
        if not before.get("done"):
            return "it was begun, and did not end"
        gone = [str(place) for place in step.outputs.values() if not place.exists()]
        return f"{', '.join(gone)} is not there" if gone else None


def record_of(step: Step) -> dict[str, Any]:
    """What decides about a step: its command, where it writes, and its inputs as they are now."""
    inputs = {str(path): fingerprint(path) for path in read_by(step)}
    outputs = {key: str(place) for key, place in step.outputs.items()}
    return {"command": step.command, "outputs": outputs, "inputs": inputs, "done": False}


def read_by(step: Step) -> list[Path]:
    """The declared inputs, and files named by arguments of the command, also after a `=`."""
    own = set(step.outputs.values())
    arguments = [
        part for word in step.command[1:] for part in (word, word.partition("=")[2]) if part
    ]
    paths = (shipped(Path(word)) for word in arguments if len(word) < 4096)
    named = filter(_is_file, paths)
    return [path for path in dict.fromkeys([*step.inputs, *named]) if path not in own]


def one_at_a_time(folder: Path) -> AbstractContextManager[None]:
    """While it is open, no other pipeline runs in the folder. Raises ConfigError."""
    held = ConfigError(
        f"{folder}: a pipeline runs in it; wait for its end, or choose another folder"
    )
    return exclusive(folder / ".pipeline.lock", held=held)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    if before.get("command") != now["command"]:
        found.append("its command changed")
    if before.get("outputs") != now["outputs"]:
        found.append("its outputs are elsewhere")
    old = before.get("inputs", {})
    if changed := [path for path, print_ in now["inputs"].items() if old.get(path) != print_]:
        found.append(f"{', '.join(changed)} changed")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a word that is no path
        return False

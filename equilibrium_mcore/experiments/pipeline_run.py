"""Runs the steps of a pipeline that have something to do, in order, until one fails."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import COMMANDS, REPOSITORY
from equilibrium_mcore.experiments.pipeline import Pipeline, Step
from equilibrium_mcore.experiments.pipeline_state import State, one_at_a_time, read_by, record_of
from equilibrium_mcore.files.archive import move_to_archive
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics

STOPPED = 128 + signal.SIGTERM  # exit status after a signal


@dataclass(frozen=True, kw_only=True)
class StepSelection:
    """Which steps: all, `only` one, or those `start` and after. `again`: though unchanged.

    `keep` leaves outputs of changed steps in their place, so that a run is continued there.
    """

    only: str | None = None
    start: str | None = None
    again: bool = False
    keep: bool = False
    dry_run: bool = False


def run_pipeline(
    pipeline: Pipeline,
    choice: StepSelection,
    *,
    command_line: str = "",
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Run what must be run; the exit status of the step that failed, or 0.

    `command_line` is how the user continues after a failure. Raises ConfigError for an unknown
    step, for inputs that are not there, and where another pipeline works in the folder.
    """
    steps = chosen(pipeline, choice)
    if choice.dry_run:
        _plan(pipeline, steps, choice, say)
    _check_inputs(pipeline, steps)
    if choice.dry_run:
        return 0
    with one_at_a_time(pipeline.folder):
        state = State.read(pipeline)
        for step in steps:
            status = _do(pipeline, step, state, choice, say)
            if status:
                say(
                    f"{step.name}: failed with exit status {status}. What was done stays; when the "
                    f"cause is gone, the same command continues with this step: {command_line}"
                )
                return status
    say(f"{pipeline.name}: {len(steps)} step(s) done, in {pipeline.folder}")
    return 0


def chosen(pipeline: Pipeline, choice: StepSelection) -> list[Step]:
    """The steps that are asked for, in order."""
    if choice.only is not None:
        return [pipeline.step(choice.only)]
    if choice.start is None:
        return pipeline.steps
    return pipeline.steps[pipeline.steps.index(pipeline.step(choice.start)) :]


def unfinished_run(folder: Path) -> str | None:
    """How a training run in the folder stopped before its last step; None where none did.

    A run that was asked to stop saves and ends with status 0.
    """
    metrics = folder / METRICS_FILE
    if not metrics.is_file():
        return None
    events = [record for record in read_metrics(metrics) if record["kind"] == "event"]
    last = events[-1] if events else {"event": "start"}
    if last["event"] == "end":
        return None
    return f"{folder} holds a run that stopped at step {last.get('step')}, before its last one"


def _do(
    pipeline: Pipeline, step: Step, state: State, choice: StepSelection, say: Callable[[str], None]
) -> int:
    record = record_of(step)
    reason = state.reason(step, record) or ("asked for again" if choice.again else None)
    if reason is None:
        say(f"{step.name}: unchanged")
        return 0
    say(f"{step.name}: {reason}\n  {shlex.join(['python', *_arguments(step)])}")
    if not choice.keep:
        for place in state.outdated(step, record):
            if moved := move_to_archive(place.parent, [place.name]):
                say(f"  what it wrote before, of other inputs, is in {moved}")
    state.write(pipeline, step, record)
    for place in step.outputs.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    status = _call(step) or _ended(step, say)
    if not status:
        state.write(pipeline, step, {**record, "done": True})
    return status


def _call(step: Step) -> int:
    """Run the step's command; SIGTERM and SIGINT are handed on, and then it is not done."""
    signals: list[int] = []
    started: list[subprocess.Popen] = []

    def hand_on(number: int, _: object) -> None:
        signals.append(number)
        for process in started:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        started.append(subprocess.Popen([sys.executable, *_arguments(step)]))
        status = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        return STOPPED
    return status if status >= 0 else 128 - status


def _arguments(step: Step) -> list[str]:
    """A step's command as this installation has it; the tool may stand after a launcher."""
    command = step.command
    place = next((n for n, word in enumerate(command) if word in COMMANDS.values()), None)
    if place is None or Path(command[place]).is_file():
        return command
    name = next(name for name, tool in COMMANDS.items() if tool == command[place])
    here = ["-m", "equilibrium_mcore.cli", name]
    if REPOSITORY is not None:
        here = [str(REPOSITORY / command[place])]
    return [*command[:place], *here, *command[place + 1 :]]


def _ended(step: Step, say: Callable[[str], None]) -> int:
    """0 if all that the step declares is there, and whole."""
    problems = [
        f"its output {key}, {place}, is not there"
        for key, place in step.outputs.items()
        if not place.exists()
    ]
    problems += filter(None, (unfinished_run(place) for place in step.outputs.values()))
    for problem in problems:
        say(f"{step.name}: its command succeeded, but {problem}")
    return int(bool(problems))


def _check_inputs(pipeline: Pipeline, steps: list[Step]) -> None:
    """Raise ConfigError for tools and inputs that are not there and that no chosen step makes."""
    made = {place for step in steps for place in step.outputs.values()}
    owners = {p: s.name for s in pipeline.steps for p in s.outputs.values()}
    problems = []
    for step in steps:
        tool = step.command[0]
        if tool != "-m" and not Path(tool).is_file() and tool not in COMMANDS.values():
            problems.append(f"step {step.name}: {tool} is not there; tools are named as tools/X.py")
        needed = {*step.inputs, *_outputs_of(pipeline, step.needs)}
        for path in sorted(needed - made):
            if not path.exists():
                way = f"run step {owners[path]} first" if path in owners else "make it first"
                problems.append(f"step {step.name}: its input {path} is not there: {way}")
    if problems:
        raise ConfigError(problems, source=f"pipeline {pipeline.name}")


def _outputs_of(pipeline: Pipeline, names: list[str]) -> set[Path]:
    return {place for name in names for place in pipeline.step(name).outputs.values()}


def _plan(
    pipeline: Pipeline, steps: list[Step], choice: StepSelection, say: Callable[[str], None]
) -> None:
    """Say what would run, and why; nothing is written."""
    state, running = State.read(pipeline), set()
    for step in steps:
        reason = state.reason(step, record_of(step)) or ("asked for again" if choice.again else "")
        waits = [name for name in step.needs if name in running]
        if not reason and waits:
            reason = f"perhaps: it reads what {', '.join(waits)} writes"
        if reason:
            running.add(step.name)
        say(f"{step.name}: {reason or 'unchanged'}")
        say(f"  {shlex.join(['python', *_arguments(step)])}")
        say(f"  reads {', '.join(map(str, read_by(step))) or 'nothing that is declared'}")
        say(f"  writes {', '.join(map(str, step.outputs.values())) or 'nothing that is declared'}")

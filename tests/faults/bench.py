"""A small run that accidents befall, and what must hold after each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics
from tests.faults.nursery import Born, Command, Nursery
from tests.support.runs import MODEL, make_data, tiny_run

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY, BATCH = 14, 2, 2
TRAIN = ("-m", "equilibrium_mcore.pretrain")
PATIENCE_SECONDS = 300  # only a hang takes so long, on however slow a machine
SMALL = {**MODEL, "layer_pattern": "+E", "hidden_size": 32}


class BrokenPromiseError(AssertionError):
    """A promise that did not hold."""


class SkippedError(Exception):
    """A case that this machine cannot have; the text says why."""


def expect(holds: bool, promise: str, evidence: object = "") -> None:
    """Raise BrokenPromiseError, with the evidence, unless the promise holds."""
    if not holds:
        raise BrokenPromiseError(f"{promise}\n{evidence}".rstrip())


@dataclass
class Job:
    """A started run: its process, and what it prints."""

    process: subprocess.Popen | Born
    output: Path

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> int:
        """The exit status. Raises BrokenPromiseError when the run does not end."""
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            end_all(self)
            raise BrokenPromiseError(
                f"the run did not end in {PATIENCE_SECONDS} s\n{self.text()}"
            ) from None

    def family(self) -> list[psutil.Process]:
        """The process and all that descend from it."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Bench:
    """Data, a config, and the curve of a run to which nothing happens."""

    def __init__(self, folder: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.say = folder, say
        (folder / "data").mkdir(parents=True)
        self.temporary = folder / "temporary"  # the runs' own, so that what they leave is seen
        self.temporary.mkdir()
        self.data = make_data(folder / "data")
        self._jobs = 0
        began = time.monotonic()
        self._nursery = Nursery()
        self.import_seconds = time.monotonic() - began  # what a fresh start takes beside
        self.references: dict[str, Any] = {}  # what scenarios compare with, made once
        say("a run to which nothing happens")
        reference = self.new_run("reference")
        began, job = time.monotonic(), self.start(reference)
        wait_until(lambda: logged_steps(reference) or job.process.poll() is not None, "it trains")
        self.start_seconds = time.monotonic() - began
        expect(job.wait() == 0, "a run to which nothing happens ends with 0", job.text())
        self.curve = curve(reference)
        expect(list(self.curve) == list(range(1, STEPS + 1)), "every step is logged", self.curve)

    def reference[T](self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned at its first call: something undisturbed to compare with."""
        if name not in self.references:
            self.references[name] = make()
        return self.references[name]

    def curve_without(self, first: int, count: int) -> dict[int, float]:
        """The curve of a run that is told from the start to leave samples out."""
        output = self.folder / f"without_{first}_{count}"
        if not output.exists():
            self.new_run(output.name)
            job = self.start(output, f"training.left_out=[[{first},{count}]]")
            expect(job.wait() == 0, "a run without some samples ends with 0", job.text())
        return curve(output)

    def curve_of(self, name: str, **changes: Any) -> dict[int, float]:
        """The curve of an undisturbed run with other sections, called `name`."""

        def made() -> dict[int, float]:
            output = self.new_run(name, **changes)
            job = self.start(output)
            expect(job.wait() == 0, f"an undisturbed run, {name}, ends with 0", job.text())
            return curve(output)

        return self.reference(f"curve of {name}", made)

    def new_run(self, name: str, **changes: Any) -> Path:
        """The output directory of a new run, with its config beside it; `changes` are sections."""
        output = self.folder / name
        sections: dict[str, Any] = {
            "model": SMALL,
            "parallelism": {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
            "training": {"steps": STEPS, "global_batch_size": BATCH, "sequence_length": 32},
            "checkpoint": {"save_interval_steps": SAVE_EVERY, "keep_last": 3},
        }
        config = tiny_run(self.data, output, **{**sections, **changes})
        save_config(config, output.with_suffix(".yaml"))
        return output

    def close(self) -> None:
        """End what forks commands, and what it forked."""
        self._nursery.close()

    def start(
        self, output: Path, *overrides: str, program: Sequence[str] = (), fresh: bool = False
    ) -> Job:
        """Start the run of `output`: forked with the libraries imported, or `fresh` as by a person.

        `program` is a program of its own that takes the arguments, which is always fresh.
        """
        if not fresh and not program:
            return self.command("train", str(output.with_suffix(".yaml")), *overrides)
        program, log = program or TRAIN, self._new_log()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    *program,
                    str(output.with_suffix(".yaml")),
                    *overrides,
                ],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        return Job(process, log)

    def command(self, name: str, *words: object, temporary: Path | None = None) -> Job:
        """Start the sub-command `name`, or `train`, with the libraries imported."""
        log = self._new_log()
        log.touch()
        folder = temporary or self.temporary
        command = Command(name, tuple(map(str, words)), str(log), str(folder))
        return Job(self._nursery.start(command), log)

    def _new_log(self) -> Path:
        self._jobs += 1
        return self.folder / f"job_{self._jobs}.txt"

    def finish(
        self,
        output: Path,
        *overrides: str,
        program: Sequence[str] = (),
        expected: dict[int, float] | None = None,
    ) -> Job:
        """Run to the end, and hold the curve against that of the run to which nothing happened."""
        job = self.start(output, *overrides, program=program)
        expect(job.wait() == 0, "the same command resumes and ends with 0", job.text())
        self.check_curve(output, expected)
        return job

    def check_curve(self, output: Path, expected: dict[int, float] | None = None) -> None:
        """Each step once, and every loss equal to the bit."""
        found, expected = curve(output), expected or self.curve
        apart = {s: (found.get(s), loss) for s, loss in expected.items() if found.get(s) != loss}
        expect(not apart, "the curve is bit for bit the straight one", apart)

    def check_left(self, pids: set[int]) -> None:
        """Nobody of `pids` is left, and no temporary folder."""
        wait_until(
            lambda: not any(_lives(pid) for pid in pids),
            "ranks end with their parent",
        )
        wait_until(lambda: not self._left(), "no temporary folder is left", self._left, patience=60)

    def _left(self) -> list[str]:
        """Temporary files and folders, but for torch's cache of compiled code, which it keeps."""
        names = (path.name for path in self.temporary.iterdir())
        return sorted(name for name in names if not name.startswith("torchinductor_"))


def no_traceback(job: Job) -> None:
    """Nothing of Python's own is shown to a user."""
    expect("Traceback" not in job.text(), "there is no traceback", job.text())


def curve(output: Path) -> dict[int, float]:
    """Loss by step. Raises BrokenPromiseError when a step stands twice."""
    path = output / METRICS_FILE
    rows = [(r["step"], r["loss"]) for r in read_metrics(path) if r["kind"] == "train"]
    steps = [step for step, _ in rows]
    expect(len(steps) == len(set(steps)), f"{METRICS_FILE} has each step once", steps)
    return dict(rows)


def logged_steps(output: Path) -> int:
    """How many steps are logged by now; a line that is being written does not count."""
    path = output / METRICS_FILE
    if not path.exists():
        return 0
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return sum(json.loads(line)["kind"] == "train" for line in whole.splitlines())


def wait_until(
    holds: Callable[[], bool],
    promise: str,
    evidence: Callable[[], object] = lambda: "",
    *,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Look until it holds; raise BrokenPromiseError when it does not for `patience` seconds."""
    deadline = time.monotonic() + patience
    while not holds():
        expect(time.monotonic() < deadline, f"{promise}, within {patience} s", evidence())
        time.sleep(0.02)


def end_all(job: Job) -> None:
    """Kill a job with everything that descends from it."""
    for process in job.family():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.process.wait()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

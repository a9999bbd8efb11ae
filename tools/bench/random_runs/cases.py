"""Cases in processes of their own: what came of each, kept in a file so that none runs twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equilibrium_mcore.files.whole import write_whole
from tools.bench.random_runs.draw import REPOSITORY, draw, drawn_settings

TOOL = "tools/bench/certificates.py"
# What a case's exit status means; any other is a crash, and none in time is a hang.
OUTCOMES = {0: "passed", 1: "false alarm", 2: "refused when built"}
CRASH, HANG = "crash", "hang"


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    number: int
    outcome: str
    seconds: float
    layout: str
    optimizer: str
    threads: int
    refused: list[str]  # proposals that the rules refused before it, in their words
    drawn: dict[str, Any]  # its settings
    # Of the certificate: worst relative difference and tolerance of every quantity.
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)
    detail: str = ""  # what failed first, or the last words of a crash


class Results:
    """Finished cases by number, in the file `path` if there is one."""

    def __init__(self, seed: int, path: Path | None) -> None:
        self.seed, self.path = seed, path
        self.by_number: dict[int, Result] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            seed, found = kept["seed"], [Result(**case) for case in kept["cases"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no results of {TOOL} ({error!r}): name another"
            ) from None
        if seed != self.seed:
            raise ValueError(
                f"{path} holds results of --seed {seed}, and --seed {self.seed} was asked for: "
                "name another file"
            )
        self.by_number = {result.number: result for result in found}

    def add(self, result: Result) -> None:
        """Keep it, in the file too."""
        self.by_number[result.number] = result
        if self.path is not None:
            cases = [asdict(self.by_number[number]) for number in sorted(self.by_number)]
            write_whole(self.path, json.dumps({"seed": self.seed, "cases": cases}, indent=1) + "\n")


def run_cases(
    results: Results,
    numbers: Iterable[int],
    *,
    jobs: int,
    limit_seconds: float,
    progress: Callable[[Result], None],
) -> None:
    """Run the cases, `jobs` at a time; `progress` is called as each ends."""
    with ThreadPoolExecutor(jobs) as pool:
        stop = threading.Event()
        work = [pool.submit(_run, results.seed, n, limit_seconds, stop) for n in numbers]
        try:
            for future in as_completed(work):
                results.add(future.result())
                progress(future.result())
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run(seed: int, number: int, limit_seconds: float, stop: threading.Event) -> Result:
    """One case in a process group of its own, which ends with it."""
    drawn = draw(seed, number)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="certificates_") as folder:
        output, log = Path(folder) / "certificate.json", Path(folder) / "log"
        command = [sys.executable, "-W", "ignore", TOOL, "--seed", str(seed), "--case", str(number)]
        with log.open("wb") as stream:  # not whole: a process writes to it, and it is removed
            process = subprocess.Popen(
                [*command, "--json", str(output)],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        status = _wait(process, started + limit_seconds, stop)
        words = log.read_text(encoding="utf-8", errors="replace")
        certificate = json.loads(output.read_text()) if output.exists() else {}
    outcome = HANG if status is None else OUTCOMES.get(status, CRASH)
    if outcome == OUTCOMES[1] and not certificate:
        outcome = CRASH  # Python's own exit status for a traceback is 1 too
    return Result(
        number=number,
        outcome=outcome,
        seconds=round(time.monotonic() - started, 1),
        layout=drawn.layout.name,
        optimizer=drawn.config.optimizer.matrices,
        threads=drawn.threads,
        refused=list(drawn.refused),
        drawn=drawn_settings(drawn),
        **_said(certificate, words),
    )


def _wait(process: subprocess.Popen, deadline: float, stop: threading.Event) -> int | None:
    """The exit status, or None at the deadline; the whole group is gone either way."""
    try:
        while process.poll() is None:
            if time.monotonic() > deadline or stop.is_set():
                return None
            time.sleep(0.1)
        return process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(certificate: dict[str, Any], words: str) -> dict[str, Any]:
    found = [v for verdicts in certificate.get("layouts", {}).values() for v in verdicts]
    failed = [v for v in found if not v["passed"]]
    last = [line.strip() for line in words.splitlines() if line.strip()]
    return {
        "differences": {v["what"]: (v["worst_relative_difference"], v["tolerance"]) for v in found},
        "detail": "; ".join(
            f"{v['what']} {v['worst_relative_difference']:.1e} at {v['where']}" for v in failed[:3]
        )
        if certificate
        else _reason(last),
    }


def _reason(lines: list[str]) -> str:
    """The line that says what went wrong: the last one that names an error, else the last one."""
    errors = [line for line in lines if "Error" in line.split(" ")[0]]
    return ((errors or lines or ["nothing was printed"])[0 if errors else -1])[:300]

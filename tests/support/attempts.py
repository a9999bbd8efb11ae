"""Commands called in a process of their own, as a user's shell would, but with libraries loaded.

Importing torch and megatron-core is what a command costs; so its process is forked from a server
that has imported both and computed nothing. What is printed, and how it ended, comes back.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

PATIENCE_SECONDS = 300  # only a hang takes so long, on however slow a machine
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Attempt:
    """What became of a command: its exit status (None: it did not end), and what it printed."""

    status: int | None
    text: str

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        return next((line for line in reversed(self.text.splitlines()) if line.strip()), "")


def attempt(
    function: Callable[[list[str]], int | None],
    arguments: list[str],
    *,
    environment: Mapping[str, str] = {},
    folder: Path | None = None,
    seconds: float = PATIENCE_SECONDS,
) -> Attempt:
    """Call `function(arguments)` in a process of its own; `function` is a module's.

    `environment` is added to this process's, which a launcher's variables are taken from, and
    `folder` is the current one there. After `seconds` it is killed, with all that it started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload", "equilibrium_mcore.train"])
    around = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    with tempfile.NamedTemporaryFile(prefix="attempt_") as output:
        process = context.Process(
            target=_play,
            args=(function, arguments, {**around, **environment}, str(folder or ""), output.name),
        )
        process.start()
        process.join(seconds)
        ended = process.exitcode is not None
        if not ended:
            for member in (*psutil.Process(process.pid).children(recursive=True), process):
                member.kill()
            process.join()
        text = Path(output.name).read_text(encoding="utf-8", errors="replace")
        return Attempt(process.exitcode if ended else None, text)


def _play(
    function: Callable[[list[str]], int | None],
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    output: str,
) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    if folder:
        os.chdir(folder)
    stream = os.open(output, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in ((0, nothing), (1, stream), (2, stream)):
        os.dup2(descriptor, number)
    sys.argv = ["attempt", *arguments]
    status: object = 1
    try:
        status = function(arguments) or 0
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    for printed in (sys.stdout, sys.stderr):
        printed.flush()
    os._exit((status or 0) & 255)

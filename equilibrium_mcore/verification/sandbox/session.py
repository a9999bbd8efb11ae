"""One sandbox: started, asked test by test, watched from outside, ended with all that is in it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from equilibrium_mcore.config.rewards import SandboxConfig
from equilibrium_mcore.verification.sandbox.file_system import environment, python_inside

START_SECONDS = 300.0  # for a hang alone
TICK_SECONDS = 0.1
SLACK_SECONDS = 60.0  # beyond the harness's own clock, on a busy machine
LINE_BYTES = 64 << 10  # what a line of the harness has beside the output
_HERE = Path(__file__).parent


class SandboxError(OSError):
    """A sandbox that does not work: a fault of this machine, not of the code in it."""


class Session:
    """A sandbox with one answer's code."""

    def __init__(
        self, backend: ModuleType, config: SandboxConfig, code: str, *, prelude: str = ""
    ) -> None:
        """Start it. Raises SandboxError where that fails."""
        self._nonce = secrets.token_hex(16)
        self._config = config
        self._limit = 4 * (config.output_kb << 10) + LINE_BYTES  # JSON may escape each byte
        self._buffer, self._errors = b"", b""
        words = [python_inside(), "-I", "-S", "-B", "-c", _source("harness")]
        command = backend.command(
            words, libraries=config.libraries, file_bytes=config.files_mb << 20
        )
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", os.defpath), **environment()},
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._selector = selectors.DefaultSelector()
        for stream in (self.process.stdout, self.process.stderr):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ)
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended; its stderr says why
                self._send(self._setup(code, prelude))
            self.uid = self._ready()["uid"]
        except BaseException:
            self.close()
            raise

    def _setup(self, code: str, prelude: str) -> dict[str, Any]:
        config = self._config
        limits = {
            "memory_bytes": config.memory_mb << 20,
            "file_bytes": config.files_mb << 20,
            "processes": config.processes + 1,  # the harness is one
            "cpu_seconds": config.seconds,
        }
        return {
            "nonce": self._nonce,
            "answer_process": _source("answer_process"),
            "code": code,
            "prelude": prelude,
            "libraries": [str(path.resolve()) for path in config.libraries],
            "limits": limits,
            "wall_seconds": config.wall_seconds,
            "output_bytes": config.output_kb << 10,
        }

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._selector.close()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def ask(self, request: Mapping[str, str]) -> dict[str, Any]:
        """What the answer's process makes of a test: {"status": ..., "value" or "reason": ...}."""
        try:
            self._send(request)
        except OSError:
            return {"status": "died", "reason": "it ended its sandbox"}
        return self._reply(2 * self._config.wall_seconds + SLACK_SECONDS)

    def _ready(self) -> dict[str, Any]:
        reply = self._reply(START_SECONDS)
        if reply["status"] == "ready":
            return reply
        self.process.kill()
        with contextlib.suppress(OSError, ValueError):
            self._errors += self.process.stderr.read() or b""
        said = self._errors.decode("utf-8", "replace").strip().splitlines()
        raise SandboxError(f"the sandbox did not start: {said[-1] if said else reply}")

    def _send(self, message: Mapping[str, Any]) -> None:
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def _reply(self, seconds: float) -> dict[str, Any]:
        """A line of the harness; what has not its nonce is not from it."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if time.monotonic() > deadline:
                return {"status": "timeout"}
            if self._memory_bytes() > self._config.memory_mb << 20:
                self.close_processes()
                return {"status": "memory"}
            for key, _ in self._selector.select(TICK_SECONDS):
                data = os.read(key.fd, 65536)
                if not data:
                    self._selector.unregister(key.fileobj)
                if key.fileobj is self.process.stderr:
                    self._errors = (self._errors + data)[-LINE_BYTES:]
                elif not data:
                    return {"status": "died", "reason": "it ended its sandbox"}
                else:
                    self._buffer += data
            if len(self._buffer) > self._limit:
                return {"status": "output"}
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
            if not secrets.compare_digest(str(message.pop("nonce", "")), self._nonce):
                raise ValueError("no nonce")
        except (ValueError, AttributeError, RecursionError):
            return {"status": "died", "reason": "a verdict without the nonce"}
        return message

    def close_processes(self) -> None:
        """Kill, and keep what was read."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _memory_bytes(self) -> int:
        """What all processes hold together, beside what one may: limits are of each by itself."""
        return sum(_resident(pid) for pid in _descendants(self.process.pid))


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for process in found:
        with contextlib.suppress(OSError, ValueError):
            children = Path(f"/proc/{process}/task/{process}/children").read_text()
            found += [int(word) for word in children.split()]
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _source(name: str) -> str:
    return (_HERE / f"{name}.py").read_text(encoding="utf-8")

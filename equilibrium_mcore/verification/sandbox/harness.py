"""The first process inside the sandbox: runs the answer's process and tells its values, one by one.

It is told a nonce, which stands in every line that it writes. The answer's process is another
program, so it has no copy of the nonce; the harness cannot be traced or read (it is not dumpable),
and its pipes are not open there. Standard library alone: its source is the argument of `python -c`.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time

CONTROL, REPLIES = 100, 101
NOBODY = 65534
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38  # <linux/prctl.h>


class Harness:
    """The answer's process, when there is one, and how to ask it."""

    def __init__(self, setup: dict) -> None:
        self.setup = setup
        self.child = 0
        self.control = self.replies = -1
        self.buffer = b""

    # ------------------------------------------------------------------------------ the child

    def start(self, *, stdin: int, stdout: int, program: bool) -> None:
        """A new answer's process with these descriptors, which are closed here."""
        control_read, self.control = os.pipe()
        self.replies, replies_write = os.pipe()
        self.buffer = b""
        self.child = os.fork()
        if not self.child:
            os.setsid()
            for source, target in (
                (stdin, 0), (stdout, 1), (os.open(os.devnull, os.O_WRONLY), 2),
                (control_read, CONTROL), (replies_write, REPLIES),
            ):  # fmt: skip
                os.dup2(source, target)
            os.chdir("/tmp")
            words = [sys.executable, "-I", "-S", "-B", "-c", self.setup["answer_process"]]
            environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
            if "LD_LIBRARY_PATH" in os.environ:  # Python itself may need it
                environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
            os.execve(words[0], words, environment)
        for descriptor in (stdin, stdout, control_read, replies_write):
            os.close(descriptor)
        first = {key: self.setup[key] for key in ("code", "prelude", "libraries", "limits")}
        self.send({**first, "program": program})

    def send(self, message: object) -> None:
        """A line to the child; it may be gone."""
        data = json.dumps(message).encode() + b"\n"
        os.set_blocking(self.control, False)
        deadline = time.monotonic() + self.setup["wall_seconds"]
        while data and time.monotonic() < deadline:
            try:
                data = data[os.write(self.control, data) :]
            except BlockingIOError:
                select.select([], [self.control], [], 0.1)
            except BrokenPipeError:
                return

    def end(self) -> int:
        """Kill everything but this process; the status of the child."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # all that this user has in this PID namespace
        status = 0
        if self.child:
            status = os.waitpid(self.child, 0)[1]
            os.close(self.control)
            os.close(self.replies)
        self.child = 0
        return status

    # ---------------------------------------------------------------------------------- tests

    def value_of(self, expression: str) -> dict:
        """The value of an expression, from a child that lasts."""
        if not self.child:
            nowhere = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
            self.start(stdin=nowhere[0], stdout=nowhere[1], program=False)
        self.send(expression)
        deadline = time.monotonic() + self.setup["wall_seconds"]
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.replies], [], [], left)[0]:
                self.end()
                return {"status": "timeout"}
            data = os.read(self.replies, 65536)
            if not data:
                return died(self.end())
            self.buffer += data
            if len(self.buffer) > self.setup["output_bytes"]:
                self.end()
                return {"status": "output"}
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            message = json.loads(line)
            return {key: message[key] for key in ("status", "value", "reason") if key in message}
        except (ValueError, TypeError, KeyError, RecursionError):
            self.end()
            return {"status": "died", "reason": "it wrote no value"}

    def output_of(self, text: str) -> dict:
        """What the program prints for this input; a new process each time."""
        self.end()
        input_read, input_write = os.pipe()
        output_read, output_write = os.pipe()
        self.start(stdin=input_read, stdout=output_write, program=True)
        try:
            return self._exchange(input_write, output_read, text.encode("utf-8", "replace"))
        finally:
            self.end()
            os.close(output_read)

    def _exchange(self, writes: int, reads: int, data: bytes) -> dict:
        """Write the input while reading the output, within time and size.

        It is over when the program has ended, whatever processes it left behind.
        """
        deadline = time.monotonic() + self.setup["wall_seconds"]
        os.set_blocking(writes, False)
        os.set_blocking(reads, False)
        output, status, is_open = b"", None, True
        try:
            while is_open or status is None:
                if not data and writes >= 0:
                    os.close(writes)
                    writes = -1
                if status is None:
                    status = self._status()
                if time.monotonic() > deadline:
                    return {"status": "timeout"}
                waiting = [writes] if writes >= 0 else []
                ready = select.select([reads] if is_open else [], waiting, [], 0.02)
                if ready[1]:
                    data = written(writes, data)
                if ready[0]:
                    part = os.read(reads, 65536)
                    output += part
                    is_open = bool(part)
                elif status is not None:
                    break
                if len(output) > self.setup["output_bytes"]:
                    return {"status": "output"}
        finally:
            if writes >= 0:
                os.close(writes)
        if status:
            return died(status)
        return {"status": "output_text", "value": output.decode("utf-8", "replace")}

    def _status(self) -> "int | None":
        """How the child ended; None while it runs. What it left is killed."""
        done, status = os.waitpid(self.child, os.WNOHANG)
        if not done:
            return None
        self.child = 0
        os.close(self.control)
        os.close(self.replies)
        self.end()
        return status


def written(descriptor: int, data: bytes) -> bytes:
    """What is left of `data` after a write; nothing where nobody reads."""
    try:
        return data[os.write(descriptor, data[:4096]) :]
    except BrokenPipeError:
        return b""


def died(status: int) -> dict:
    """How a process ended without a value."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return {"status": "timeout"}
        return {"status": "died", "reason": f"it ended by signal {number}"}
    return {"status": "died", "reason": f"it ended with status {os.WEXITSTATUS(status)}"}


def drop_privileges() -> None:
    """Be nobody, in a user namespace of its own where there may be one, and closed to others.

    Root has no limit on its processes. The namespace makes that limit count this sandbox alone.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with contextlib.suppress(OSError):
            os.unshare(os.CLONE_NEWUSER)
    if library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or library.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl was refused")


def main() -> None:
    """Set up, say so, then a line for every test."""
    tests = os.fdopen(os.dup(0), "rb")
    setup = json.loads(tests.readline())
    nonce = setup.pop("nonce")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(message: dict) -> None:
        answers.write(json.dumps({**message, "nonce": nonce}).encode() + b"\n")
        answers.flush()

    drop_privileges()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    say({"status": "ready", "uid": os.getuid()})
    harness = Harness(setup)
    for line in tests:
        test = json.loads(line)
        if "input" in test:
            message = harness.output_of(test["input"])
        else:
            message = harness.value_of(test["expression"])
        say(message)
    harness.end()


if __name__ == "__main__":
    main()

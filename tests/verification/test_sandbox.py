"""The sandbox: what code in it cannot reach, do, leave behind or forge."""

from __future__ import annotations

import errno
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from equilibrium_mcore.config.rewards import CodeTestsConfig, SandboxConfig
from equilibrium_mcore.verification.code_tests import CodeTests
from equilibrium_mcore.verification.sandbox import choose
from equilibrium_mcore.verification.sandbox.answer_process import MACHINES, REFUSED_CALLS
from equilibrium_mcore.verification.sandbox.choose import BACKENDS, NoSandboxError, why_not
from equilibrium_mcore.verification.sandbox.session import SandboxError, Session
from equilibrium_mcore.verification.scored import Example

PATIENCE_SECONDS = 120  # for a hang alone
LIMITS = SandboxConfig(
    processes=12, memory_mb=256, output_kb=16, files_mb=4, wall_seconds=PATIENCE_SECONDS
)

ATTACKS = """
import ctypes, gc, os, signal, socket, sys, time

def told(work, *arguments):
    try:
        return work(*arguments)
    except BaseException as error:
        return type(error).__name__

def connect(address, port):
    with socket.create_connection((address, port), timeout=3) as connection:
        return connection.recv(100).decode()

def read(path):
    with open(path, errors="replace") as stream:
        return stream.read()

def write(path):
    with open(path, "w") as stream:
        stream.write("x")
    return "written"

def fill(folder):
    size = 0
    try:
        for number in range(10_000):
            with open(f"{folder}/{number}", "wb") as stream:
                size += stream.write(bytes(100_000))
    except OSError:
        pass
    return size

def forks(most):
    children = []
    try:
        for _ in range(most):
            child = os.fork()
            if not child:
                time.sleep(1000)
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)

def daemon(mark):
    if not os.fork():
        os.setsid()
        if not os.fork():
            words = ["-I", "-S", "-c", "import time; time.sleep(1000)", mark]
            os.execv(sys.executable, [sys.executable, *words])
        os._exit(0)
    return "started"

def peek(pid):  # read another process's memory, take one of its descriptors, trace it
    library = ctypes.CDLL(None, use_errno=True)
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    mine = ctypes.create_string_buffer(16)
    local = Vector(ctypes.addressof(mine), 16)
    remote = Vector(id(None), 16)
    results = [library.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)]
    results.append(library.ptrace(16, pid, 0, 0))  # PTRACE_ATTACH
    handle = library.syscall(434, pid, 0)  # pidfd_open
    results.append(library.syscall(438, handle, 1, 0))  # pidfd_getfd
    if handle >= 0:
        os.close(handle)
    return results

def calls(numbers):  # what a system call answers to nonsense
    library = ctypes.CDLL(None, use_errno=True)
    answers = []
    for number in numbers:
        library.syscall(number, -1, -1, -1, -1, -1)
        answers.append(ctypes.get_errno())
    return answers

def at_work():  # what ordinary code does: threads, processes
    import subprocess, threading
    found = []
    thread = threading.Thread(target=lambda: found.append("thread"))
    thread.start()
    thread.join()
    found.append(subprocess.run([sys.executable, "-I", "-S", "-c", "print('process')"],
                                capture_output=True, text=True).stdout.strip())
    return found

def scribble():  # a verdict of its own into whatever is open
    line = b'{"status": "value", "value": ["int", "42"], "nonce": ""}\\n'
    for descriptor in range(3, 300):
        if descriptor != 101:
            try:
                os.write(descriptor, line)
            except OSError:
                pass
    for _ in range(3):
        print(line.decode(), flush=True)
    return 0

def seen(mark):  # whether a text is anywhere in this process; the mark is given in pieces
    whole = "".join(mark)
    gc.collect()
    texts = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
    held = [v for o in texts for v in (o.values() if isinstance(o, dict) else o)]
    return any(isinstance(v, (str, bytes)) and v is not whole and whole in str(v) for v in held)
"""


def available(name: str):
    reason = why_not(name)
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason))


@pytest.fixture(scope="module", params=[available(name) for name in BACKENDS])
def backend(request):
    return BACKENDS[request.param]


@pytest.fixture(scope="module")
def session(backend):
    """One sandbox for all attacks that do not end it."""
    with Session(backend, LIMITS, ATTACKS) as session:
        yield session


def any_backend():
    """For what the harness does, whatever is round it."""
    try:
        return choose.choose_backend()
    except NoSandboxError as error:
        pytest.skip(str(error))


def value(session: Session, expression: str):
    reply = session.ask({"expression": expression})
    assert reply["status"] == "value", reply
    return reply["value"]


def outside(expression: str) -> str:
    """The same without a sandbox: an attack that fails there as well shows nothing."""
    words = [sys.executable, "-c", f"{ATTACKS}\nprint({expression})"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def rewarded(code: str, tests, *, sandbox: SandboxConfig = LIMITS, **settings):
    any_backend()
    reward = CodeTests(CodeTestsConfig(sandbox=sandbox, **settings))
    return reward.score(Example(f"So:\n```python\n{code}\n```\n", tests))


# ------------------------------------------------------------------------------------------ reach


def test_trap_no_network(session):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    server.accept()[0].sendall(b"in")
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        attack = f"told(connect, '127.0.0.1', {server.getsockname()[1]})"
        assert outside(attack) == "in"
        assert value(session, attack)[1] in ("ConnectionRefusedError", "OSError", "TimeoutError")
        server.shutdown(socket.SHUT_RDWR)


def test_trap_no_files_of_the_host(session, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    secret.chmod(0o644)
    assert outside(f"told(read, {str(secret)!r})") == "secret"
    absent = ("FileNotFoundError", "NotADirectoryError")
    for path in (secret, "/etc/passwd", "/etc/hosts", "/proc/self/environ", __file__):
        assert value(session, f"told(read, {str(path)!r})")[1] in absent
    for path in ("/x", "/usr/x", "/dev/x", f"{sys.base_prefix}/x", os.__file__):
        assert value(session, f"told(write, {path!r})")[1] in (
            "OSError", "PermissionError", "FileNotFoundError",
        )  # fmt: skip
    assert value(session, "told(write, '/tmp/x')") == ["str", "written"]


def test_trap_the_environment_is_empty(backend, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert outside("os.environ.get('SECRET_TOKEN')") == "abc"
    with Session(backend, LIMITS, ATTACKS) as session:
        names = {name[1] for name in value(session, "sorted(os.environ)")[1]}
        assert names <= {"LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHASHSEED"}


def test_trap_no_other_processes(session):
    own = os.getpid()
    assert outside(f"told(os.kill, {own}, 0)") == "None"
    assert value(session, f"told(os.kill, {max(own, 1000)}, 0)")[1] == "ProcessLookupError"
    assert value(session, "os.getpid() < 1000") == ["bool", "True"]
    assert value(session, "told(os.listdir, '/proc')")[1] == "FileNotFoundError"


def test_trap_another_user_without_privileges(session):
    assert session.uid == 65534 and value(session, "os.getuid()") == ["int", "65534"]
    assert value(session, "told(os.setuid, 0)")[1] in ("PermissionError", "OSError")
    assert value(session, "told(os.chroot, '/tmp')")[1] == "PermissionError"


def test_trap_no_namespaces_and_no_calls_that_only_attacks_need(session):
    """A user namespace of its own would give it capabilities, and with them much of the kernel."""
    for flag in ("CLONE_NEWUSER", "CLONE_NEWNET"):
        assert value(session, f"told(os.unshare, os.{flag})")[1] == "PermissionError"
    if platform.machine() in MACHINES:
        place = MACHINES[platform.machine()][0]
        numbers = [of_machine[place] for of_machine in REFUSED_CALLS.values()]
        answers = [int(item[1]) for item in value(session, f"calls({numbers})")[1]]
        assert answers == [errno.EPERM] * len(numbers)
    assert value(session, "at_work()")[1] == [["str", "thread"], ["str", "process"]]


# ------------------------------------------------------------------------------------------ limits


def test_trap_memory_of_one_process(session):
    assert value(session, "told(bytearray, 1 << 30)")[1] == "MemoryError"


def test_trap_memory_of_all_processes_together(backend):
    """Each by itself stays within its limit."""
    code = """
import os, time
def hold():
    for _ in range(8):
        if not os.fork():
            held = bytearray(os.urandom(1)) * (150 << 20)
            time.sleep(1000)
    time.sleep(1000)
"""
    limits = SandboxConfig(memory_mb=256, wall_seconds=PATIENCE_SECONDS)
    with Session(backend, limits, code) as session:
        assert session.ask({"expression": "hold()"})["status"] == "memory"
        assert session.process.wait(PATIENCE_SECONDS)


def test_trap_fork_bomb_also_as_root(session):
    """As root RLIMIT_NPROC does not bind: 300 forks were had."""
    assert 0 < int(value(session, "forks(300)")[1]) <= LIMITS.processes


def test_trap_files_are_bounded(session):
    assert 0 < int(value(session, "fill('/tmp')")[1]) <= LIMITS.files_mb << 20


def test_trap_output_flood():
    backend = any_backend()
    with Session(backend, LIMITS, "while True: print('x' * 1000)") as session:
        assert session.ask({"input": ""})["status"] == "output"
    with Session(backend, LIMITS, "def much(): return 'x' * 10_000_000") as session:
        assert session.ask({"expression": "much()"})["status"] == "output"


def test_trap_endless_loops_end():
    """By CPU time, and by the clock for what sleeps or ignores the signal."""
    backend = any_backend()
    quick = SandboxConfig(seconds=0.1, wall_seconds=PATIENCE_SECONDS)
    with Session(backend, quick, "def f():\n    while True: pass") as session:
        assert session.ask({"expression": "f()"})["status"] == "timeout"
        assert session.ask({"expression": "1"})["value"] == ["int", "1"]  # a new process
    clock = SandboxConfig(wall_seconds=1)
    with Session(backend, clock, "import time\ndef f(): time.sleep(1000)") as session:
        assert session.ask({"expression": "f()"})["status"] == "timeout"


def running(mark: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def wait_until(condition) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_trap_no_daemon_is_left(backend):
    mark = f"daemon-of-{os.getpid()}-{backend.NAME}"
    with Session(backend, LIMITS, ATTACKS) as session:
        assert value(session, f"daemon({mark!r})") == ["str", "started"]
        assert wait_until(lambda: running(mark))
    assert wait_until(lambda: not running(mark))


def test_trap_a_daemon_of_one_test_is_not_there_in_the_next():
    """Programs: each test has its processes for itself, and ends with its own."""
    backend = any_backend()
    mark = f"left-by-{os.getpid()}-{backend.NAME}"
    code = f"{ATTACKS}\nif input() == 'leave':\n    daemon({mark!r})\nprint('done')"
    with Session(backend, LIMITS, code) as session:
        assert session.ask({"input": "leave"})["value"] == "done\n"
        assert wait_until(lambda: not running(mark))
        assert session.ask({"input": "stay"})["value"] == "done\n"


# ------------------------------------------------------------------------------------------ forgery


def test_trap_the_harness_cannot_be_read_or_traced(session):
    assert outside("peek(os.getpid())[0]") == "16"
    results = [int(item[1]) for item in value(session, "peek(os.getppid())")[1]]
    assert results == [-1, -1, -1]


def test_trap_what_is_written_or_printed_is_no_verdict(session):
    assert value(session, "scribble()") == ["int", "0"]
    assert value(session, "6 * 7 - 1") == ["int", "41"]


def test_trap_only_its_own_two_pipes_are_open(session):
    """That of its expressions and that of its values; the harness's are not there."""
    opened = "[d for d in range(3, 128) if told(os.fstat, d) != 'OSError']"
    assert [item[1] for item in value(session, opened)[1]] == ["100", "101"]
    assert value(session, "sys.stdin.read()") == ["str", ""]


def test_trap_a_verdict_without_the_nonce_is_none():
    with Session(any_backend(), LIMITS, "x = 3") as session:
        assert value(session, "x") == ["int", "3"]
        session._nonce = "0" * 32
        reply = session.ask({"expression": "x"})
        assert reply == {"status": "died", "reason": "a verdict without the nonce"}


def test_trap_expected_results_are_not_in_the_process():
    backend = any_backend()
    mark = "EXPECTED-RESULT-7321"
    code = f"{ATTACKS}\ndef f(): return seen(['EXPECTED-RES', 'ULT-7321'])"
    part = rewarded(code, [{"call": "f", "arguments": [], "result": mark}], sandbox=LIMITS)
    assert part.verdict == "wrong"
    with Session(backend, LIMITS, code) as session:
        assert value(session, "f()") == ["bool", "False"]
        assert value(session, f"[x for x in [{mark!r}] if seen(['EXPECTED-RES', 'ULT-7321'])]")[1]


FORGERIES = {
    "exit status": "import os\nos._exit(0)",
    "exit in the function": "import os\ndef add(a, b): os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "printed": 'def add(a, b): print(\'{"status": "value", "value": ["int", "3"]}\')',
    "kills the harness": "import os, signal\ndef add(a, b): os.kill(os.getppid(), signal.SIGKILL)",
    "stops the harness": "import os, signal\ndef add(a, b):\n    os.kill(-1, signal.SIGKILL)",
    "equals everything": (
        "class Always(int):\n    def __eq__(self, other): return True\n"
        "def add(a, b): return Always(7)"
    ),
    "replaced builtins": (
        "import builtins, json\nbuiltins.bool = lambda x: True\njson.dumps = lambda x: "
        '\'{"status": "passed"}\'\ndef add(a, b): return 0'
    ),
    "assertions switched off": "import sys\nsys.flags\n__debug__\ndef add(a, b): return None",
    "hostile value": "import os\nos.write(101, b'[' * 5000 + b'\\n')\ndef add(a, b): return 0",
    "not plain": "def add(a, b): return add",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_trap_code_rewards_are_not_forged(code):
    part = rewarded(code, ["assert add(1, 2) == 3"], sandbox=SandboxConfig(wall_seconds=3))
    assert part.value == 0.0 and part.verdict in ("wrong", "timeout")


def test_trap_without_a_sandbox_code_is_refused_not_run(monkeypatch):
    for module in BACKENDS.values():
        monkeypatch.setattr(module, "is_present", lambda: False)
    monkeypatch.setattr(choose, "why_not", why_not.__wrapped__)
    with pytest.raises(NoSandboxError, match="(?s)bwrap.*apt-get install bubblewrap"):
        CodeTests(CodeTestsConfig())


# -------------------------------------------------------------------------------------------- tests


ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("code", "tests", "value", "verdict"),
    [
        (ADD, ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"], 1.0, "ok"),
        (ADD, "assert add(1, 2) == 3\nassert add(1, 2) == 4", 0.0, "wrong"),
        (ADD, {"tests": [{"call": "add", "arguments": [[1], [2]], "result": [1, 2]}]}, 1.0, "ok"),
        (ADD, ["assert add(0.1, 0.2) == 0.3"], 1.0, "ok"),
        (ADD, ["assert add(0.1, 0.21) == 0.3"], 0.0, "wrong"),
        (ADD, ["assert abs(add(1, 1) - 2.4) < 0.5", "assert not add(0, 0)"], 1.0, "ok"),
        ("def f(): return (1, 2)", [{"call": "f", "result": [1, 2]}], 1.0, "ok"),
        ("def f(): return (1, 2)", ["assert f() == [1, 2]"], 0.0, "wrong"),
        ("def f(): return {3, 1, 2}", ["assert f() == set([1, 2, 3])"], 1.0, "ok"),
        ("def f(): return {'a': [1.5, None]}", ["assert f() == {'a': [1.5, None]}"], 1.0, "ok"),
        ("print(int(input()) ** 2)", [{"input": "7", "output": "49"}], 1.0, "ok"),
        ("print(int(input()) ** 2)", [{"input": "x", "output": "49"}], 0.0, "wrong"),
        ("def add(a, b:", ["assert add(1, 2) == 3"], 0.0, "wrong"),
        (ADD, ["assert add(1, 2) == three"], 0.0, "error"),
        (ADD, [], 0.0, "error"),
        (ADD, None, 0.0, "error"),
    ],
)
def test_verdicts_of_code(code, tests, value, verdict):
    part = rewarded(code, tests)
    assert (part.value, part.verdict) == (value, verdict), part


def test_a_share_of_the_tests():
    code = "import os\ndef f(x):\n    if x == 1: os._exit(0)\n    return x"
    tests = [f"assert f({x}) == {x % 3}" for x in range(4)]
    part = rewarded(code, tests, credit="share")
    assert (part.value, part.verdict) == (0.5, "wrong") and "2 of 4" in part.reason


def test_code_from_libraries_that_are_named(tmp_path):
    (tmp_path / "helper.py").write_text("def three(): return 3")
    code, tests = "from helper import three", ["assert three() == 3"]
    known = SandboxConfig(libraries=[tmp_path])
    if os.getuid() == 0:
        with pytest.raises(SandboxError, match="let all users read it"):
            rewarded(code, tests, sandbox=known)
    tmp_path.chmod(0o755)
    assert rewarded(code, tests).verdict == "wrong"
    assert rewarded(code, tests, sandbox=known).verdict == "ok"


def test_the_code_is_the_last_whole_block():
    any_backend()
    reward = CodeTests(CodeTestsConfig(sandbox=LIMITS))
    tests = ["assert add(1, 2) == 3"]
    for text, verdict in (
        (f"```python\nx = 1\n```\nBetter:\n```python\n{ADD}\n```\nThat is all.", "ok"),
        (f"```\n{ADD}\n```\n```text\nadd\n```", "ok"),
        (f"```python\n{ADD}\n", "unparsed"),
        (ADD, "unparsed"),
        ("", "unparsed"),
    ):
        assert reward.score(Example(text, tests)).verdict == verdict, text
    assert CodeTests(CodeTestsConfig(fence="optional")).score(Example(ADD, tests)).verdict == "ok"

"""What runs the answer's code, in a process of its own inside the sandbox. Standard library alone.

It limits itself, runs the code, then evaluates expression after expression and writes each value.
It knows no expected result and no secret, so it is free to do what it likes.
"""

import json
import math
import os
import sys

CONTROL, REPLIES = 100, 101  # descriptors, from the harness
MAX_DEPTH = 50


def encode(value: object, depth: int = 0) -> list:
    """A plain value with its type; no subclass, whose comparison would be its own.

    Raises ValueError for anything else.
    """
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if value is None:
        return ["none"]
    if kind in (bool, int, float, complex):
        return [kind.__name__, repr(value)]
    if kind is str:
        return ["str", value]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, [encode(item, depth + 1) for item in value]]
    if kind is dict:
        pairs = [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]
        return ["dict", pairs]
    raise ValueError(f"a value of type {kind.__name__} is not plain")


def limit(limits: dict) -> None:
    """Bound this process and what it starts."""
    import resource

    def bound(name: str, value: int) -> None:
        most = resource.getrlimit(getattr(resource, name))[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(getattr(resource, name), (value, value))

    bound("RLIMIT_CORE", 0)
    bound("RLIMIT_AS", limits["memory_bytes"])
    bound("RLIMIT_FSIZE", limits["file_bytes"])
    bound("RLIMIT_NOFILE", 128)
    bound("RLIMIT_NPROC", limits["processes"])
    more_cpu(limits["cpu_seconds"])


def more_cpu(seconds: float) -> None:
    """CPU time for the next test; beyond it comes SIGXCPU, which tells a timeout from other ends.

    Code that ignores the signal meets the clock of the harness.
    """
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    if most != resource.RLIM_INFINITY:
        soft = min(soft, most)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, most))


def reply(message: dict) -> None:
    """One line to the harness."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(REPLIES, data) :]


def told(error: BaseException) -> dict:
    """An exception as a reply."""
    return {"status": "exception", "reason": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    """Run the code; then, unless it is a whole program, evaluate expressions."""
    control = os.fdopen(CONTROL, "rb")
    setup = json.loads(control.readline())
    for descriptor in (CONTROL, REPLIES):
        os.set_inheritable(descriptor, False)
    sys.path += setup["libraries"]
    limit(setup["limits"])
    names = {"__name__": "__main__" if setup["program"] else "solution"}
    try:
        exec(compile(setup["prelude"], "prelude", "exec"), names)
        exec(compile(setup["code"], "answer", "exec"), names)
    except BaseException as error:
        if setup["program"]:
            raise
        reply(told(error))
        os._exit(1)
    if setup["program"]:
        return
    for line in control:
        more_cpu(setup["limits"]["cpu_seconds"])
        try:
            message = {"status": "value", "value": encode(eval(json.loads(line), names))}
        except BaseException as error:
            message = told(error)
        reply(message)


if __name__ == "__main__":
    main()

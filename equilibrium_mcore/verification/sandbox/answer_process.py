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


# System calls that only an attack needs, by machine: (x86-64, 64-bit ARM) of <asm/unistd.h>. What
# makes namespaces gives capabilities within them, and with these much of the kernel.
REFUSED_CALLS = {
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # <linux/audit.h>
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # <linux/seccomp.h>
NAMESPACES = 0x7E020080  # the CLONE_NEW flags of clone(2)


def filter_program(machine: str) -> bytes:
    """A classic BPF program for seccomp: refuses REFUSED_CALLS, and clone with a new namespace.

    clone3, whose flags it cannot see, is not there: libraries then use clone.
    """
    import struct

    place, architecture = MACHINES[machine]
    load, equal, any_bit, at_least, end = 0x20, 0x15, 0x45, 0x35, 0x06
    steps = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (end, 0, 0, KILL),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x40000000),  # x32 has numbers of its own
        (end, 0, 0, ERRNO | EPERM),
    ]
    for numbers in REFUSED_CALLS.values():
        steps += [(equal, 0, 1, numbers[place]), (end, 0, 0, ERRNO | EPERM)]
    steps += [(equal, 0, 1, CLONE3[place]), (end, 0, 0, ERRNO | ENOSYS)]
    steps += [(equal, 0, 3, CLONE[place]), (load, 0, 0, 16), (any_bit, 0, 1, NAMESPACES)]
    steps += [(end, 0, 0, ERRNO | EPERM), (end, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def refuse_calls() -> None:
    """Take REFUSED_CALLS from this process and what it starts; nothing on other machines."""
    import ctypes
    import platform
    import struct

    if platform.machine() not in MACHINES:
        return
    program = filter_program(platform.machine())
    steps = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(steps))
    library = ctypes.CDLL(None, use_errno=True)
    pr_set_seccomp, mode_filter = 22, 2
    if library.prctl(pr_set_seccomp, mode_filter, described, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp was refused")


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
    refuse_calls()
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

"""Builds a sandbox by the kernel's namespaces alone, then runs a command in it. Standard library.

What bubblewrap does, for hosts without it: its source is the argument of `python -c`, then a JSON
object (what is seen inside) and the command. Linux on x86-64 and 64-bit ARM.
"""

import contextlib
import ctypes
import json
import os
import platform
import signal
import stat
import sys

# <sys/mount.h>, <linux/prctl.h>
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME, MS_BIND = 32, 1024, 2048, 4096
MS_REC, MS_PRIVATE, MS_RELATIME = 16384, 1 << 18, 1 << 21
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534
BASE = "/tmp"  # where the new root is mounted, until it is the root
KEPT = {os.ST_NOSUID: MS_NOSUID, os.ST_NODEV: MS_NODEV, os.ST_NOEXEC: MS_NOEXEC}
KEPT |= {os.ST_NOATIME: MS_NOATIME, os.ST_NODIRATIME: MS_NODIRATIME, os.ST_RELATIME: MS_RELATIME}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raises OSError for a call of the C library that failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    words = [word.encode() or None for word in (source, target, kind)]
    result = libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None)
    check(result, f"mount {source} at {target}")


def enter_namespaces() -> None:
    """New namespaces of everything; without root of users, too."""
    flags = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        os.unshare(flags)
        return
    os.unshare(flags | os.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def build_root(spec: dict) -> None:
    """The new file system at BASE: links, read-only folders, devices, /tmp."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    # Opened now: what lies in /tmp is hidden by the mount.
    sources = {path: os.open(path, os.O_PATH) for path in (*spec["read_only"], *spec["devices"])}
    mount("tmpfs", BASE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    os.mkdir(f"{BASE}/tmp")
    size = f"mode=1777,size={spec['file_bytes']}"
    mount("tmpfs", f"{BASE}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    for name, target in spec["links"]:
        os.symlink(target, BASE + name)
    for path, source in sources.items():
        is_folder = stat.S_ISDIR(os.fstat(source).st_mode)
        os.makedirs(BASE + (path if is_folder else os.path.dirname(path)), 0o755, exist_ok=True)
        if not is_folder:
            os.close(os.open(BASE + path, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/proc/self/fd/{source}", BASE + path, flags=MS_BIND | MS_REC)
        os.close(source)
    bound = tuple(f"{BASE}{path}/" for path in spec["read_only"])
    for place in mount_points():
        if f"{place}/".startswith(bound):
            make_read_only(place)


def mount_points() -> list[str]:
    """What is mounted below BASE, but for what the host has in its folder of that name."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:  # noqa: PTH123
        places = [line.split()[4] for line in lines]
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        places = [place.replace(code, character) for place in places]
    return [p for p in places if p.startswith(f"{BASE}/") and os.path.exists(p)]


def make_read_only(place: str) -> None:
    """Remount with the flags that it has: a user namespace may take none away."""
    has = os.statvfs(place).f_flag
    flags = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV
    for seen, flag in KEPT.items():
        flags |= flag if has & seen else 0
    mount("none", place, flags=flags)


def change_root() -> None:
    """Make BASE the root and let go of the old one."""
    os.chdir(BASE)
    check(libc.syscall(PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")
    mount("none", "/", flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def end_with_parent() -> None:
    """Be killed when the parent ends."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def first_process(words: list[str]) -> None:
    """Process 1: start the command, collect what it leaves, end with it, which ends them all."""
    end_with_parent()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    command = os.fork()
    if not command:
        os.execve(words[0], words, {k: v for k, v in os.environ.items() if k != "PATH"})
    while True:
        with contextlib.suppress(ChildProcessError):
            done, status = os.waitpid(-1, 0)
            if done == command:
                os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main() -> None:
    """Build, run, end."""
    end_with_parent()
    spec, words = json.loads(sys.argv[1]), sys.argv[2:]
    try:
        enter_namespaces()
        build_root(spec)
        change_root()
    except OSError as error:
        sys.exit(str(error))
    child = os.fork()
    if not child:
        first_process(words)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)


if __name__ == "__main__":
    main()

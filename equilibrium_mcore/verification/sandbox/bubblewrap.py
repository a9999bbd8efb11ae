"""The sandbox by bubblewrap: namespaces, and a file system of what Python needs, read-only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

NAME = "bubblewrap"
MISSING = "bubblewrap: `bwrap` is not on PATH"


def command(words: Sequence[str], *, libraries: Sequence[Path], file_bytes: int) -> list[str]:
    """`words`, to be run inside."""
    return [
        "bwrap", *_namespaces(), "--die-with-parent",
        *_files(libraries, file_bytes), "--", *words,
    ]  # fmt: skip


def is_present() -> bool:
    """Whether the program is there; whether it works is another question."""
    return shutil.which("bwrap") is not None


def _namespaces() -> list[str]:
    parts = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    parts += ["--unshare-cgroup-try", "--hostname", "sandbox", "--cap-drop", "ALL", "--clearenv"]
    if os.geteuid() == 0:
        # The harness becomes another user: root has no limit on its processes.
        return [*parts, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    parts += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    return [*parts, "--disable-userns"] if "--disable-userns" in _help() else parts


def _files(libraries: Sequence[Path], file_bytes: int) -> list[str]:
    parts: list[str] = []
    for target, link in root_links():
        parts += ["--symlink", link, target]
    paths = read_only_paths(libraries)
    for folder in sorted({str(p) for path in (*paths, "/dev/null") for p in Path(path).parents}):
        # Made on the way to a mount, they would be closed to other users than root.
        parts += [] if folder == "/" else ["--perms", "0755", "--dir", folder]
    for path in paths:
        parts += ["--ro-bind", path, path]
    for device in ("null", "zero", "random", "urandom"):
        parts += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    parts += ["--perms", "1777", "--size", str(file_bytes), "--tmpfs", "/tmp"]
    return [*parts, "--remount-ro", "/", "--chdir", "/"]


def root_links() -> list[tuple[str, str]]:
    """Links in / that lead into /usr on this system: (name, target)."""
    names = ("/bin", "/sbin", "/lib", "/lib64", "/lib32")
    return [(name, os.readlink(name)) for name in names if Path(name).is_symlink()]


def read_only_paths(libraries: Sequence[Path]) -> list[str]:
    """What Python needs: its own folders and the shared libraries of the system."""
    linked = {name for name, _ in root_links()}
    base = Path(sys.base_prefix).resolve()
    python = Path(python_inside())
    wanted = [Path(name) for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64") if name not in linked]
    wanted.append(Path("/etc/ld.so.cache"))
    if base in (Path("/usr"), Path("/usr/local")):  # these have much else
        wanted += [python, base / "lib"]
    else:
        wanted += [base, python]
    wanted += [path.resolve() for path in libraries]
    kept: list[Path] = []
    for path in dict.fromkeys(wanted):
        if path.exists() and not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return [str(path) for path in kept]


def python_inside() -> str:
    """The interpreter of this process without its virtual environment."""
    executable = getattr(sys, "_base_executable", None) or sys.executable
    return str(Path(executable).resolve())


@cache
def _help() -> str:
    return subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout

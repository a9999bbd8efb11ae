"""The sandbox by bubblewrap: namespaces, and a file system of what Python needs, read-only."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from equilibrium_mcore.verification.sandbox.file_system import (
    DEVICES,
    environment,
    read_only_paths,
    root_links,
)

NAME = "bubblewrap"
MISSING = "bubblewrap: `bwrap` is not on PATH"


def command(words: Sequence[str], *, libraries: Sequence[Path], file_bytes: int) -> list[str]:
    """`words`, to be run inside."""
    return [
        "bwrap", *_namespaces(), "--die-with-parent",
        *(part for item in environment().items() for part in ("--setenv", *item)),
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
    # First, since what is bound may lie in the host's /tmp.
    parts = ["--perms", "1777", "--size", str(file_bytes), "--tmpfs", "/tmp"]
    for target, link in root_links():
        parts += ["--symlink", link, target]
    paths = read_only_paths(libraries)
    for folder in sorted({str(p) for path in (*paths, "/dev/null") for p in Path(path).parents}):
        # Made on the way to a mount, they would be closed to other users than root.
        parts += [] if folder in ("/", "/tmp") else ["--perms", "0755", "--dir", folder]
    for path in paths:
        parts += ["--ro-bind", path, path]
    for device in DEVICES:
        parts += ["--dev-bind", device, device]
    return [*parts, "--remount-ro", "/", "--chdir", "/"]


@cache
def _help() -> str:
    return subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout

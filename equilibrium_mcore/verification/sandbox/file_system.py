"""What a sandbox shows of the host's files: Python and its shared libraries, read-only."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def root_links() -> list[tuple[str, str]]:
    """Links in / that lead into /usr on this system: (name, target)."""
    names = ("/bin", "/sbin", "/lib", "/lib64", "/lib32")
    return [(name, os.readlink(name)) for name in names if Path(name).is_symlink()]


def read_only_paths(libraries: Sequence[Path]) -> list[str]:
    """What Python needs: its own folders and the shared libraries of the system."""
    linked = {name for name, _ in root_links()}
    base = Path(sys.base_prefix).resolve()
    python = Path(python_inside())
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
    wanted = [Path(name) for name in system if name not in linked]
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


def environment() -> dict[str, str]:
    """All that the processes inside have: where Python's own shared library lies."""
    return {"LD_LIBRARY_PATH": str(Path(sys.base_prefix).resolve() / "lib")}

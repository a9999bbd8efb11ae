"""The sandbox by the kernel's namespaces alone, where bubblewrap is not installed."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

from equilibrium_mcore.verification.sandbox.file_system import (
    DEVICES,
    python_inside,
    read_only_paths,
    root_links,
)
from equilibrium_mcore.verification.sandbox.namespace_builder import PIVOT_ROOT

NAME = "namespaces"
MISSING = f"namespaces: needs one of {', '.join(PIVOT_ROOT)}, and this is {platform.machine()}"


def is_present() -> bool:
    """Whether the builder knows this machine's system calls."""
    return platform.machine() in PIVOT_ROOT


def command(words: Sequence[str], *, libraries: Sequence[Path], file_bytes: int) -> list[str]:
    """`words`, to be run inside."""
    builder = Path(__file__).with_name("namespace_builder.py").read_text(encoding="utf-8")
    spec = {
        "links": root_links(),
        "read_only": read_only_paths(libraries),
        "devices": DEVICES,
        "file_bytes": file_bytes,
    }
    return [python_inside(), "-I", "-S", "-B", "-c", builder, json.dumps(spec), *words]

"""One meaning of `~` and `$VARS`, in configs and on command lines."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand_path(text: str | Path) -> Path:
    """The path that `text` means: `~`, `~user`, `$NAME` and `${NAME}` are replaced.

    Raises ValueError for a variable that is not set (or empty), and for a user who is not known:
    a folder named after a misspelt variable is never made.
    """
    whole = str(text)

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if not os.environ.get(name):
            raise ValueError(
                f"{whole}: the environment variable {name} is not set: set it, or "
                "write the path out"
            )
        return os.environ[name]

    path = _VARIABLE.sub(value, whole)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{whole}: {reason}: write the path out") from None


def expand_text(text: str) -> str:
    """`text` with `~` and `$VARS` replaced, else letter for letter: `./data` keeps its dot.

    For text that may be a path or something else, such as a name on the Hub. Raises ValueError as
    `expand_path` does.
    """
    return str(expand_path(text)) if text.startswith("~") or "$" in text else text


def user_path(text: str) -> Path:
    """A path on a command line: argparse's `type=`, whose errors argparse shows as they are."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def report_path(text: str) -> Path:
    """argparse's `type=` for a report, plot or JSON that is written: absent, or a regular file.

    Told before the work that the report is about; a link is followed, not replaced.
    """
    path = user_path(text)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise argparse.ArgumentTypeError(f"{path} is {kind}, and is not replaced: name a file")
    return path.resolve() if path.is_symlink() else path

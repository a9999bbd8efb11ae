"""One meaning of `~` and `$VARS`, in configs and on command lines."""

from __future__ import annotations

import argparse
import os
import re
import stat
from pathlib import Path

LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes: what common file systems take
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand_path(text: str | Path) -> Path:
    """The path that `text` means: `~`, `~user`, `$NAME` and `${NAME}` are replaced.

    Raises ValueError for a variable that is not set (or empty), and for a user who is not known:
    a folder named after a misspelt variable is never made. For what no file can be called, too.
    """
    whole = str(text)
    if not whole.strip():
        raise ValueError("a path is empty: write it out; the current folder is .")

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
        found = Path(path).expanduser()
    except RuntimeError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{whole}: {reason}: write the path out") from None
    _refuse_name(whole, path)
    return found


def _refuse_name(whole: str, path: str) -> None:
    """Raise ValueError for what no file can be called: asking for it would be an error, too."""
    if "\0" in path:
        raise ValueError(f"{whole[:80]!r}: no file name holds the character NUL: take it out")
    content = path.encode("utf-8", "surrogateescape")
    longest = max(map(len, content.split(b"/")))
    if longest > LONGEST_NAME or len(content) > LONGEST_PATH:
        what = f"a name of {longest:,} bytes" if longest > LONGEST_NAME else "a path"
        most = LONGEST_NAME if longest > LONGEST_NAME else LONGEST_PATH
        raise ValueError(
            f"{whole[:60]}...: {what} is longer than the {most:,} bytes that a file system takes: "
            "shorten it"
        )


def expand_text(text: str) -> str:
    """`text` with `~` and `$VARS` replaced, else letter for letter: `./data` keeps its dot.

    For text that may be a path or something else, such as a name on the Hub. Raises ValueError as
    `expand_path` does.
    """
    return str(expand_path(text)) if text.startswith("~") or "$" in text else text


def real_path(path: Path) -> Path:
    """`path.resolve()`; a circle of links, for which that raises, stays as it is."""
    return Path(os.path.realpath(path))


def with_ending(path: Path, ending: str) -> Path:
    """`path` with more at the end of its name; itself where it has none, as `/` and `.`."""
    return path.with_name(path.name + ending) if path.name else path


def what_is_there(path: Path) -> str | None:
    """What is in the place of a file, in words; None for a regular file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if path.is_symlink() else "no such file"
    except ValueError:
        return "no such file"
    except OSError as error:  # e.g. too long, a circle of links, no permission
        return f"no such file ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return "a folder, not a file" if stat.S_ISDIR(mode) else "a pipe or a device, not a file"


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
    if not path.is_symlink():
        return path
    if real_path(path).is_symlink():
        raise argparse.ArgumentTypeError(f"{path} is a circle of links: name a file")
    return real_path(path)

"""One meaning of `~` and `$VARS`, in configs and on command lines."""

from __future__ import annotations

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
        raise ValueError(f"{whole}: {error}: write the path out") from None

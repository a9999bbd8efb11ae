"""Whether the files of an exported folder can be read, before transformers reads them.

What it raises for a damaged file is its parsers' own, and names no file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.files.errors import reason


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """While transformers loads from `folder`; raises ValueError, which names it or a file in it."""
    check_files(folder)
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes its parsers raise
        raise ValueError(f"{folder} cannot be loaded: {reason(error)}. {_way_out()}") from None


def check_files(folder: Path) -> None:
    """Raises ValueError for a file of JSON or of weights in the folder that cannot be read."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(str(path), framework="pt"):
                    pass
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {reason(error)}. {_way_out()}") from None


def _way_out() -> str:
    return f"Bring it back from a copy, or export again: {command('convert')} --help"

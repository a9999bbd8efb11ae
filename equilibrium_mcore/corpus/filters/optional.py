"""Libraries and files that only some filters need: their absence is reported before any work."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from equilibrium_mcore.data.compression import refuse_pipe

# The extra of pyproject.toml that has these libraries; the extra `data` includes it.
INSTALL = "pip install -e '.[filters]'"


class MissingLibraryError(ImportError):
    """A library that a filter needs is not installed."""


def require(
    module: str,
    *,
    wanted_by: str,
    install: str = "pip install -e '.[filters]' (an extra of pyproject.toml)",
) -> ModuleType:
    """The module, imported. Raises MissingLibraryError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibraryError(
            f"filter {wanted_by} needs the library {module.split('.')[0]}, which cannot be "
            f"imported ({error}); install it with: {install}"
        ) from None


def require_file(path: Path, *, wanted_by: str, key: str, advice: str) -> Path:
    """The path. Raises FileNotFoundError that names the filter, its setting, and a way out."""
    refuse_pipe(path)
    if not path.is_file():
        raise FileNotFoundError(f"filter {wanted_by}: {key}={path} does not exist; {advice}")
    return path

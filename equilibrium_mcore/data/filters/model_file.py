"""Small models as safetensors: arrays and plain settings, nothing that runs on loading."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_KIND, _SETTINGS = "equilibrium_mcore.kind", "equilibrium_mcore.settings"


def save_model(
    path: Path, *, kind: str, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a model aside and rename it into place."""
    from safetensors.numpy import save

    metadata = {_KIND: kind, _SETTINGS: json.dumps(dict(settings), sort_keys=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(save(dict(arrays), metadata=metadata))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_model(path: Path, *, kind: str, made_by: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(settings, arrays) of a model. Raises ValueError when the file is not one of this kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            held = metadata.get(_KIND)
            if held != kind:
                raise ValueError(f"it holds {held or 'no model of this project'}, not {kind}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return json.loads(metadata[_SETTINGS]), arrays
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no model that {made_by} wrote: {error}") from None

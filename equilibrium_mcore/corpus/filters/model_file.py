"""Small models as safetensors: arrays and plain settings, nothing that runs on loading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.files.replace import refuse_existing, refuse_sources
from equilibrium_mcore.files.whole import write_whole

_KIND, _SETTINGS = "equilibrium_mcore.kind", "equilibrium_mcore.settings"


def save_model(
    path: Path, *, kind: str, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a model, whole."""
    from safetensors.numpy import save

    metadata = {_KIND: kind, _SETTINGS: json.dumps(dict(settings), sort_keys=True)}
    write_whole(path, save(dict(arrays), metadata=metadata))


def check_output(output: Path, *, inputs: Sequence[Path], overwrite: bool) -> None:
    """Before hours of training: whether the model may be written to `output`.

    Raises ValueError for another ending than .safetensors, and FileExistsError if something is
    there, unless `overwrite` and it is a model of this project.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: must end in .safetensors")
    refuse_sources([output], inputs, option="--output")
    refuse_existing(
        [output],
        overwrite=overwrite,
        is_ours=_is_model,
        what="a filter's model of this project",
        option="--output",
    )


def _is_model(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return _KIND in (file.metadata() or {})
    except (SafetensorError, ValueError):
        return False


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
        raise ValueError(f"{path} is no model that `{made_by}` wrote: {error}") from None

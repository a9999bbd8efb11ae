"""Where a run finds its model and its data: a file, a bare name, or values in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import CONFIGS, REPOSITORY
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.files.paths import expand_path, with_ending

FOLDERS = {"model": "models", "data": "data"}


def find_file(reference: str, *, kind: str, folder: Path) -> Path:
    """The YAML file that `reference` names.

    Tried in order: relative to `folder`, to the current directory and to this project, and as a
    bare name in the project's `configs/models` (kind `model`) or `configs/data` (kind `data`).
    A model's name may have a slash for an underscore: `llama/1b`.
    Raises ConfigError with the places and the known names when there is none.
    """
    shelf = CONFIGS / FOLDERS[kind]
    try:
        path = expand_path(reference)
    except ValueError as error:
        raise ConfigError(f"{kind}={error}") from None
    candidates = [folder / path, Path.cwd() / path]
    if path.parts[:1] == ("configs",):
        candidates.append(CONFIGS.joinpath(*path.parts[1:]))
    elif len(path.parts) > 1 and REPOSITORY is not None:
        candidates.append(REPOSITORY / path)
    if path.suffix not in (".yaml", ".yml"):
        candidates = [with_ending(c, ".yaml") for c in candidates] + candidates
        if len(path.parts) == 1:
            candidates.append(shelf / f"{path}.yaml")
        elif kind == "model" and len(path.parts) == 2:
            candidates.append(shelf / f"{'_'.join(path.parts)}.yaml")
    elif len(path.parts) == 1:
        candidates.append(shelf / path)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(dict.fromkeys(str(c) for c in candidates))
    known = ", ".join(sorted(f.stem for f in shelf.glob("*.yaml"))) or "none"
    raise ConfigError(
        f"{kind}={reference!r}: no such file (tried {tried}); give a path to a YAML file, or one "
        f"of the names in {shelf}: {known}"
    )


def resolve(value: Any, *, kind: str, folder: Path, seen: tuple[Path, ...] = ()) -> Any:
    """`value` as plain values: a reference is read, and `from: FILE` is merged under its keys.

    Anything that is neither text nor a mapping is returned as it is, for the schema to refuse.
    """
    if isinstance(value, str):
        reference, own_keys = value, {}
    elif isinstance(value, dict) and "from" in value:
        reference = value["from"]
        own_keys = {key: item for key, item in value.items() if key != "from"}
    else:
        return value
    if not isinstance(reference, str):
        raise ConfigError(f"{kind}.from={reference!r}: must be the path or name of a YAML file")
    path = find_file(reference, kind=kind, folder=folder).resolve()
    if path in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise ConfigError(f"{kind}: files name each other by `from` in a circle: {chain}")
    base = resolve(read_mapping(path), kind=kind, folder=path.parent, seen=(*seen, path))
    return merge(base, own_keys)


def merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it; mappings merge key by key, all else is replaced."""
    merged = dict(base)
    for key, item in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, item) if isinstance(old, dict) and isinstance(item, dict) else item
    return merged

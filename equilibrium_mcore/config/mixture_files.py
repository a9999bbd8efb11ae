"""Where mixtures are, by path and by name, and where the data that was prepared of one is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import CONFIGS, command, shipped
from equilibrium_mcore.config.mixture import PHASE_KINDS
from equilibrium_mcore.config.stages import STAGES
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.files.paths import expand_path, with_ending

SHELF = CONFIGS / "data"
PREPARED = Path("data")  # in the current folder: prepared mixtures, where no place is given
MANIFEST = "manifest.json"


def find_mixture(path: str | Path) -> Path:
    """The file itself, or the one of that name in `configs/data`. Raises ConfigError."""
    try:
        given = shipped(expand_path(path))
    except ValueError as error:
        raise ConfigError(f"mixture {error}") from None
    for base in (given, SHELF / given):
        for candidate in (base, with_ending(base, ".yaml")):
            if candidate.is_file():
                return candidate
    known = sorted(str(p.relative_to(SHELF)) for p in SHELF.glob("*/**/*.yaml"))
    raise ConfigError(
        f"mixture {path}: no such file, here or in {SHELF}; there are {', '.join(known) or 'none'}"
    )


def mixture_of_stage(stage: str, phase: str | None, name: str) -> Path:
    """The mixture `configs/data/STAGE/PHASE/NAME.yaml`; `name` may also be a path.

    Raises ConfigError with the mixtures that the stage has.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        return find_mixture(name)
    shelf = SHELF / STAGES[stage].data_folder
    file = shelf / (phase or "") / f"{name}.yaml"
    if file.is_file():
        return file
    known = [
        " ".join([*(f"--phase {part}" for part in path.parent.parts), "--data_mixture", path.stem])
        for path in sorted(p.relative_to(shelf) for p in shelf.rglob("*.yaml"))
    ]
    raise ConfigError(
        f"--data_mixture {name}: {file} is not there; stage {stage} has {', '.join(known)}. Or "
        "give the path of a mixture of your own, with a / in it"
    )


def mixture_name(file: Path) -> str:
    """What a mixture is called that does not say it."""
    return "_".join(_parts(file))


def default_place(mixture: Path) -> Path:
    """Where a mixture is prepared if nobody says otherwise: `data/pretrain/phase1/mixture1`."""
    return PREPARED.joinpath(*_parts(mixture))


def prepared_data(mixture: Path, place: Path | None = None) -> Path:
    """The file that a run names as `data:`, of a mixture that was prepared in `place`.

    Raises ConfigError with the command that prepares it, where that was not done.
    """
    folder = default_place(mixture) if place is None else place
    manifest = _read_manifest(mixture, folder)
    wanted = str(read_mapping(mixture).get("name") or mixture_name(mixture))
    if manifest.get("name") != wanted:
        raise ConfigError(
            f"{folder} holds the mixture {manifest.get('name')!r}, not {wanted!r} of {mixture}: "
            "name the folder in which that one was prepared (--prepared, data.prepared), or "
            f"prepare it: {prepare_command(mixture, default_place(mixture))}"
        )
    files = manifest.get("blends") or []
    if len(files) == 1:
        return folder / files[0]
    if not files:
        raise ConfigError(
            f"{folder} holds no file that a run can name as its data: its phase is "
            f"{manifest.get('phase')!r}. Is it from an earlier version, prepare it again: "
            f"{prepare_command(mixture, folder)} --overwrite"
        )
    stages = ", ".join(str(folder / file) for file in files)
    raise ConfigError(
        f"{folder} holds a curriculum of {len(files)} stages: give the file of the one to train "
        f"on as data.config_path: {stages}"
    )


def prepare_command(mixture: Path, place: Path) -> str:
    """The command line that prepares a mixture there."""
    line = f"{command('prepare')} {shlex.join([_as_given(mixture), '--output', str(place)])}"
    values = read_mapping(mixture)
    metadata = values.get("metadata") or {}
    kind = metadata.get("kind") or PHASE_KINDS.get(str(metadata.get("phase")))
    if values.get("tokenizer") is None and kind == "text":
        line += " --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER"
    return line


def _read_manifest(mixture: Path, folder: Path) -> dict:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"the mixture {_as_given(mixture)} was not prepared in {folder} (there is no "
            f"{MANIFEST}): {prepare_command(mixture, folder)}; or name the folder where it was "
            "(--prepared, data.prepared)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if isinstance(manifest, dict) and {"name", "phase"} <= manifest.keys():
        return manifest
    raise ConfigError(f"{path} is not that of `{command('prepare')}`: name another folder")


def _as_given(mixture: Path) -> str:
    """The mixture's name in `configs/data`, or its path."""
    if mixture.resolve().is_relative_to(SHELF):
        return "/".join(_parts(mixture))
    here = Path.cwd()
    return str(mixture.relative_to(here) if mixture.is_relative_to(here) else mixture)


def _parts(file: Path) -> tuple[str, ...]:
    resolved = file.resolve()
    if resolved.is_relative_to(SHELF):
        return resolved.relative_to(SHELF).with_suffix("").parts
    return (file.stem,)

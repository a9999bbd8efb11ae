"""A run by names: the stage's template, a model, a mixture, and a folder for all of it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.experiment import is_experiment
from equilibrium_mcore.config.experiment_keys import OWN
from equilibrium_mcore.config.installation import CONFIGS, command, shipped
from equilibrium_mcore.config.layout import launched_world_size
from equilibrium_mcore.config.load import load_run, save_config
from equilibrium_mcore.config.mixture_files import mixture_of_stage
from equilibrium_mcore.config.rule_kit import Host
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.stages import DEFAULT_STAGE, STAGES
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.files.paths import real_path
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.parallel.launch import rank_info_from_environment
from equilibrium_mcore.train import run_stage
from equilibrium_mcore.training.run_folder import check_run_folder

TEMPLATES = CONFIGS / "experiments"
COMMANDS_FILE = "commands.txt"  # in the experiment's folder: every command line that started it
EXPERIMENT_FILE = "experiment.yaml"  # the run as it was checked; config.yaml is what trains


@dataclass(frozen=True, kw_only=True)
class ExperimentNames:
    """What the command line names. Paths and names, not yet looked up; None: the template's."""

    stage: str
    output_dir: Path | None = None
    run_name: str | None = None
    phase: str | None = None
    data_mixture: str | None = None
    prepared: Path | None = None
    model_config: str | None = None
    initial_weights: Path | None = None
    experiment: Path | None = None


def load_named_run(
    names: ExperimentNames, overrides: Sequence[str] = (), *, host: Host | None = None
) -> RunConfig:
    """The run of these names, all checked; `overrides` are `key=value`: keys or settings.

    Raises ConfigError with every problem.
    """
    file = _file_of(names)
    if file.is_file() and names.experiment:
        _check_experiment(file, names.stage)
    stage = [] if names.experiment else [f"stage={names.stage}"]  # a template may be of several
    changes = [f"{key}={json.dumps(value)}" for key, value in _values_of(names).items()]
    world_size = launched_world_size(os.environ)
    return load_run(file, [*changes, *stage, *overrides], world_size=world_size, host=host)


def _check_experiment(file: Path, stage: str) -> None:
    values = read_mapping(file)
    if not is_experiment(values):
        raise ConfigError(
            f"--experiment {file}: no experiment file, since it has no section `experiment`; start "
            f"a run file with {command('run')} {file}"
        )
    own = (values.get(OWN) or {}).get("stage", DEFAULT_STAGE)
    if own != stage:
        raise ConfigError(
            f"--stage {stage}, but {file} is of stage {own}: give --stage {own}, or another "
            "--experiment"
        )


def _file_of(names: ExperimentNames) -> Path:
    return shipped(names.experiment) if names.experiment else template_of(names.stage)


def template_of(stage: str) -> Path:
    """The experiment file that a stage starts from: its own, or that of a stage like it."""
    return TEMPLATES / f"{STAGES[stage].template or stage}_template.yaml"


def start(config: RunConfig, command: Sequence[str]) -> int:
    """Write the experiment's folder, then run the stage; the exit status.

    Nothing is written where another run works in the folder. Raises ConfigError.
    """
    rank_info = rank_info_from_environment(os.environ)
    if rank_info is None or rank_info.rank == 0:
        check_run_folder(config)
        save_config(config, config.output_directory / EXPERIMENT_FILE)
        add_command(config.output_directory, command)
    return run_stage(config)


def add_command(folder: Path, command: Sequence[str]) -> None:
    """Add a command line, with the time, to those that started runs in the folder."""
    file = folder / COMMANDS_FILE
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    write_whole(file, f"{before}# {now} UTC\n{shlex.join(command)}\n")


def _values_of(names: ExperimentNames) -> dict[str, object]:
    """The keys of an experiment file that the names give a value."""
    values: dict[str, object] = {}
    if names.run_name is not None:
        values |= {"experiment.name": names.run_name, "logging.wandb_run_name": names.run_name}
    if names.output_dir is not None:
        values["checkpointing.output_dir"] = str(names.output_dir)
    if names.initial_weights is not None:
        weights = str(names.initial_weights)
        values |= {"model.from_scratch": False, "model.checkpoint_path": weights}
    if names.model_config is not None or names.initial_weights is not None:
        values["model.config_path"] = names.model_config
    if names.data_mixture is not None:
        mixture = mixture_of_stage(names.stage, _phase(names), names.data_mixture)
        values |= {"data.config_path": str(mixture), "data.prepared": None}
    if names.prepared is not None:
        values["data.prepared"] = str(names.prepared)
    file = _file_of(names)
    if real_path(file).parent == TEMPLATES:  # its own are those of its example
        named = (names.stage, names.phase, names.data_mixture, names.model_config)
        values |= {"experiment.tags": [n for n in named if n], "experiment.description": ""}
        values.setdefault("model.checkpoint_path", None)
    return values


def _phase(names: ExperimentNames) -> str | None:
    shelf = CONFIGS / "data" / STAGES[names.stage].data_folder
    phases = sorted(path.name for path in shelf.iterdir() if path.is_dir())
    if names.phase is None or names.phase in phases:
        return names.phase
    there = f"one of {', '.join(phases)}" if phases else "none: leave it out"
    raise ConfigError(f"--phase {names.phase}: stage {names.stage} has {there}")

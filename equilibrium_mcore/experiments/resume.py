"""A run resumed from its folder alone: its stored config, its newest whole checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from equilibrium_mcore.checkpoint.choose import FoundCheckpoint, find_alone
from equilibrium_mcore.checkpoint.compatibility import check_resumable
from equilibrium_mcore.checkpoint.directory import CONFIG_FILE, list_checkpoints, step_of
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.config.layout import launched_world_size
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.rule_kit import Host
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.experiments.start import add_command
from equilibrium_mcore.parallel.launch import rank_info_from_environment
from equilibrium_mcore.train import run_stage
from equilibrium_mcore.training.run_folder import check_run_folder


def load_stored_run(
    folder: Path, overrides: Sequence[str] = (), *, host: Host | None = None
) -> RunConfig:
    """The run of `folder/config.yaml`, to be resumed in `folder` up to its last step.

    Where it stopped before (`training.stop_after_steps`) is forgotten; `overrides` may set it
    again. Raises ConfigError for a folder that is no run's.
    """
    _refuse_folder(folder)
    if any(override.partition("=")[0].strip() == "output_directory" for override in overrides):
        raise ConfigError(
            f"output_directory: a run is resumed where it is, in {folder}; to start another from "
            f"its weights, give that one checkpoint.initial_weights={folder}"
        )
    changes = [
        f"output_directory={json.dumps(str(folder))}",
        "checkpoint.resume=must",
        "training.stop_after_steps=null",
    ]
    world_size = launched_world_size(os.environ)
    file = folder / CONFIG_FILE
    return load_run(file, [*changes, *overrides], world_size=world_size, host=host)


def find_to_resume(config: RunConfig, *, verify: bool) -> FoundCheckpoint:
    """The newest whole checkpoint, which fits the config and has steps to go.

    With `verify` every byte is compared with its hash; without, the run itself does so when it
    starts. Raises ConfigError where there is nothing to resume, and DamagedCheckpointError where
    all that is there is damaged.
    """
    found = find_alone(config, verify=verify, workers=os.cpu_count() or 1)
    if found is None:
        raise ConfigError(
            f"checkpoint.resume={config.checkpoint.resume} finds nothing to resume: leave it out"
        )
    steps, step = config.training.steps, found.opened.facts["step"]
    if steps is None:  # of epochs, which the run counts, and checks then
        return found
    check_resumable(found.opened.config, config, checkpoint=str(found.opened.path))
    if step >= steps:
        raise ConfigError(
            f"{found.opened.path} is of step {step} of training.steps={steps}: nothing is left to "
            f"train. Prolong the run with training.steps=N, or start another from its weights"
        )
    return found


def as_text(found: FoundCheckpoint, config: RunConfig) -> str:
    """What will be resumed, and what was passed over, in lines."""
    lines = []
    for error in found.damaged:
        what = "; ".join(map(str, error.damages))
        lines.append(f"passed over, damaged: {error.checkpoint}: {what}")
    last = "its last step" if config.training.steps is None else f"step {config.training.steps}"
    step = found.opened.facts["step"]
    return "\n".join([*lines, f"resumes {found.opened.path} at step {step}, up to {last}"])


def resume(config: RunConfig, command: Sequence[str]) -> int:
    """Say what is resumed, note the command line in the folder, and train; the exit status."""
    rank_info = rank_info_from_environment(os.environ)
    if rank_info is None or rank_info.rank == 0:
        check_run_folder(config)
        print(as_text(find_to_resume(config, verify=False), config), flush=True)
        add_command(config.output_directory, command)
    return run_stage(config)


def _refuse_folder(folder: Path) -> None:
    """Raise ConfigError for a folder in which there is nothing to resume."""
    if step_of(folder) is not None and folder.parent.name == "checkpoints":
        raise ConfigError(
            f"{folder} is one checkpoint: name its run's folder, {folder.parent.parent}, and this "
            f"step with checkpoint.resume_step={step_of(folder)}"
        )
    saved = list_checkpoints(folder)
    if not saved:
        raise ConfigError(
            f"{folder} holds no checkpoint, so there is nothing to resume: name the folder of a "
            f"run that has saved one (its output_directory), or start one: `{command('train')}`"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{folder / CONFIG_FILE} is not there, which a run writes at its start: bring it back "
            f"from a copy; each checkpoint has one too, e.g. {saved[-1] / CONFIG_FILE}"
        )

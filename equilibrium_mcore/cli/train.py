"""Train: a stage, a model and a mixture by their names, in a folder that holds all of the run.

Takes the stage's template in configs/experiments, lays these options and the key=value changes
over it, checks all, and runs. The experiment's folder gets the effective config (config.yaml), the
command line, checkpoints and logs. The same command again resumes; {resume} does
too. A mixture that was not prepared is an error that has the command. docs/guides/experiments.md.

Examples:
    {prog} --stage pretrain --phase phase1 --data_mixture mixture1 \\
        --model_config llama/1b --output_dir experiments/exp001 --run_name llama-1b-phase1
    {prog} --stage sft --data_mixture general --initial_weights experiments/exp001 \\
        --output_dir experiments/exp002 --run_name llama-1b-sft training.epochs=3

Exit status: 0 trained to its end or stopped, 2 settings that cannot be, 1 a rank failed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from equilibrium_mcore.cli.command import add_host, judged_by
from equilibrium_mcore.config.installation import command_line
from equilibrium_mcore.config.stages import MEANINGS, STAGES
from equilibrium_mcore.files.paths import user_path

TOLD = (OSError,)  # what else fails has a traceback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Names of what is trained on what; each option with underscores or hyphens."""

    def add(name: str, text: str, **settings: Any) -> None:
        both = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*both, help=text, **settings)

    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the experiment file, or settings"
    )
    add("stage", MEANINGS, choices=tuple(STAGES), required=True)
    add("phase", "phase1, phase2: a folder of the stage's mixtures")
    add("data_mixture", "NAME in configs/data/STAGE/PHASE, or the path of a mixture")
    add("prepared", "the mixture's prepared folder (data/STAGE/PHASE/NAME)", type=user_path)
    add("model_config", "a model, e.g. llama/1b (that of --initial_weights)")
    add("initial_weights", "a run's folder, or one of its checkpoints", type=user_path)
    add("output_dir", "the experiment's folder", type=user_path, required=True)
    add("run_name", "what the run is called, also in Weights & Biases", required=True)
    add("experiment", "an experiment file instead of the template", type=user_path)
    parser.add_argument("--check", action="store_true", help="print the config; start nothing")
    add_host(parser)


def run(options: argparse.Namespace) -> int:
    """Check, train; the exit status."""
    from equilibrium_mcore.config.yaml_io import to_yaml
    from equilibrium_mcore.experiments.start import ExperimentNames, load_named_run, start
    from equilibrium_mcore.train import check_without_starting

    given = vars(options)
    check, changes, host = given.pop("check"), given.pop("overrides"), given.pop("host")
    config = load_named_run(ExperimentNames(**given), changes, host=judged_by(host, check=check))
    if not check:
        return start(config, command_line())
    check_without_starting(config, host == "gpu")
    sys.stdout.write(to_yaml(config.model_dump(mode="json")))
    return 0

"""Run a pipeline: steps that prepare, train, tune and export, each when its inputs have changed.

A step runs if it never did, if its command or an input is another than before, if it did not end,
or if what it writes is not there. What a changed step wrote before is moved to archive/ beside it.
After a failure, a kill or a signal the same command continues. docs/guides/experiments.md.

Examples:
    {prog} configs/experiments/full_pipeline.yaml --dry-run
    {prog} configs/experiments/full_pipeline.yaml model=llama/3b workers=32
    {prog} configs/experiments/full_pipeline.yaml --only export
    {prog} configs/experiments/full_pipeline.yaml --from sft \\
        'sft_settings=[training.epochs=3]'

Exit status: 0 all done, 2 the pipeline or its inputs are wrong, else that of the step that failed.
"""

from __future__ import annotations

import argparse
import shlex

from equilibrium_mcore.config.installation import command_line
from equilibrium_mcore.files.paths import user_path

TOLD = ()  # a fault here has a traceback; the steps tell their own errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, its variables, and which of its steps."""
    add = parser.add_argument
    add("pipeline", type=user_path, metavar="PIPELINE.yaml", help="the file with the steps")
    add("changes", nargs="*", metavar="key=value", help="variables of the pipeline, and folder")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", metavar="STEP", help="this step alone")
    chosen.add_argument("--from", dest="start", metavar="STEP", help="this step and those after it")
    add("--dry-run", action="store_true", help="say what would run and why; change nothing")
    add("--again", action="store_true", help="run the chosen steps, also the unchanged ones")
    add("--keep", action="store_true", help="changed steps continue in place, e.g. longer training")


def run(options: argparse.Namespace) -> int:
    """Run the steps; the exit status."""
    from equilibrium_mcore.experiments.pipeline import load_pipeline
    from equilibrium_mcore.experiments.pipeline_run import StepSelection, run_pipeline

    given = vars(options)
    pipeline = load_pipeline(given.pop("pipeline"), given.pop("changes"))
    again = shlex.join(command_line())
    return run_pipeline(pipeline, StepSelection(**given), command_line=again)

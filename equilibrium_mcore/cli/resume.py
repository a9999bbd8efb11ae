"""Resume a run from its folder alone: the stored config, the newest whole checkpoint.

A damaged checkpoint is named and passed over; the one before it is taken. Settings may change as at
any resume (docs/reference/checkpoints.md): what must not is an error. Under torchrun or srun it
uses their ranks, and another layout than before if you give one.

Examples:
    {prog} experiments/exp001
    {prog} experiments/exp001 --check               # starts nothing
    {prog} experiments/exp001 training.steps=20000  # prolongs it

Exit status: 0 trained to its end or stopped, 2 nothing to resume or it cannot be, 1 a rank failed.
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.cli.command import add_host, judged_by
from equilibrium_mcore.config.installation import command_line
from equilibrium_mcore.files.paths import user_path

TOLD = (OSError,)  # what else fails has a traceback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what changes."""
    add = parser.add_argument
    add("folder", type=user_path, metavar="RUN_FOLDER", help="a run's output directory")
    add("overrides", nargs="*", metavar="key=value", help="settings that change")
    add("--check", action="store_true", help="verify every byte and the settings; start nothing")
    add_host(parser)


def run(options: argparse.Namespace) -> int:
    """Check, train; the exit status."""
    from equilibrium_mcore.experiments import resume
    from equilibrium_mcore.train import check_without_starting

    host = judged_by(options.host, check=options.check)
    config = resume.load_stored_run(options.folder, options.overrides, host=host)
    if not options.check:
        return resume.resume(config, command_line())
    found = resume.find_to_resume(config, verify=True)
    check_without_starting(config, options.host == "gpu")
    print(resume.as_text(found, config))
    return 0

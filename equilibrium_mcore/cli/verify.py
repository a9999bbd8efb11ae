"""Verify checkpoints: every file against its hash, and what the small files say of the data.

Nothing is changed, and nothing in a checkpoint is executed. A damaged file is named with what was
expected and what was found. Checkpoints from before there were manifests have no hashes; of those
names, sizes and structure are checked.

Examples:
    {prog} runs/mine                              # all of a run
    {prog} runs/mine/checkpoints/step_00001000    # one
    {prog} runs/mine && rsync -a runs/mine backup:

Exit status: 0 all are whole, 1 at least one is damaged, 2 there is none.
"""

from __future__ import annotations

import argparse
import os

from equilibrium_mcore.cli.command import FAILED, processes, wrong_command_line
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoints, and how many files are read at a time."""
    add = parser.add_argument
    add("directory", type=user_path, help="a run's output_directory, or one checkpoint's folder")
    workers = os.cpu_count() or 1
    add("--workers", type=processes, default=workers, help=f"files hashed at a time ({workers})")


def run(options: argparse.Namespace) -> int:
    """Verify, print a table; the exit status."""
    from equilibrium_mcore.checkpoint.verify import as_text, verify_directory

    try:
        verdicts = verify_directory(options.directory, workers=options.workers)
    except FileNotFoundError as error:  # no verdict on what is not there
        raise wrong_command_line(str(error)) from None
    print(as_text(verdicts))
    return FAILED if any(verdict.damages for verdict in verdicts) else 0

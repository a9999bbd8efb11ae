"""Resume a run from its folder alone: the stored config, the newest whole checkpoint.

A damaged checkpoint is named and passed over; the one before it is taken. Settings may change as at
any resume (docs/reference/checkpoints.md): what must not is an error. Under torchrun or srun it
uses their ranks, and another layout than before if you give one.

Examples:
    python tools/resume_training.py experiments/exp001
    python tools/resume_training.py experiments/exp001 --check               # starts nothing
    python tools/resume_training.py experiments/exp001 training.steps=20000  # prolongs it

Exit status: 0 trained to its end or stopped, 2 nothing to resume or it cannot be.
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.experiments.resume import as_text, find_to_resume, load_stored_run, resume
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.parallel.host import describe_host


def main() -> int:
    """Parse the command line, check, train; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=user_path, metavar="RUN_FOLDER", help="a run's output directory")
    add("overrides", nargs="*", metavar="key=value", help="settings that change")
    add("--check", action="store_true", help="verify every byte and the settings; start nothing")
    options = parser.parse_intermixed_args()
    try:
        host = None if options.check else describe_host()
        config = load_stored_run(options.folder, options.overrides, host=host)
        if not options.check:
            return resume(config, sys.argv)
        print(as_text(find_to_resume(config, verify=True), config))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Verify checkpoints: every file against its hash, and what the small files say of the data.

Nothing is changed, and nothing in a checkpoint is executed. A damaged file is named with what was
expected and what was found. Checkpoints from before there were manifests have no hashes; of those
names, sizes and structure are checked.

Examples:
    python tools/verify_checkpoint.py runs/mine                              # all of a run
    python tools/verify_checkpoint.py runs/mine/checkpoints/step_00001000    # one
    python tools/verify_checkpoint.py runs/mine && rsync -a runs/mine backup:

Exit status: 0 all are whole, 1 at least one is damaged, 2 there is none.
"""

from __future__ import annotations

import argparse
import os
import sys

from equilibrium_mcore.checkpoint.verify import as_text, verify_directory
from equilibrium_mcore.files.paths import user_path


def main() -> int:
    """Parse the command line, verify, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("directory", type=user_path, help="a run's output_directory, or one checkpoint's folder")
    workers = os.cpu_count() or 1
    add("--workers", type=int, default=workers, help=f"files hashed at a time ({workers})")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1 is needed")
    try:
        verdicts = verify_directory(options.directory, workers=options.workers)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_text(verdicts))
    return int(any(verdict.damages for verdict in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())

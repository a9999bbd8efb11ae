"""Run a pipeline: steps that prepare, train, tune and export, each when its inputs have changed.

A step runs if it never did, if its command or an input is another than before, if it did not end,
or if what it writes is not there. What a changed step wrote before is moved to archive/ beside it.
After a failure, a kill or a signal the same command continues. docs/guides/experiments.md.

Examples:
    python tools/run_pipeline.py configs/experiments/full_pipeline.yaml --dry-run
    python tools/run_pipeline.py configs/experiments/full_pipeline.yaml model=llama/3b workers=32
    python tools/run_pipeline.py configs/experiments/full_pipeline.yaml --only export
    python tools/run_pipeline.py configs/experiments/full_pipeline.yaml --from sft \\
        'sft_settings=[training.epochs=3]'

Exit status: 0 all done, 2 the pipeline or its inputs are wrong, else that of the step that failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.experiments.pipeline import load_pipeline
from equilibrium_mcore.experiments.pipeline_run import StepSelection, run_pipeline
from equilibrium_mcore.files.paths import user_path


def main() -> int:
    """Parse the command line, run the steps; the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("pipeline", type=user_path, metavar="PIPELINE.yaml", help="the file with the steps")
    add("changes", nargs="*", metavar="key=value", help="variables of the pipeline, and folder")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", metavar="STEP", help="this step alone")
    chosen.add_argument("--from", dest="start", metavar="STEP", help="this step and those after it")
    add("--dry-run", action="store_true", help="say what would run and why; change nothing")
    add("--again", action="store_true", help="run the chosen steps, also the unchanged ones")
    add("--keep", action="store_true", help="changed steps continue in place, e.g. longer training")
    options = vars(parser.parse_intermixed_args())
    file, changes = options.pop("pipeline"), options.pop("changes")
    try:
        pipeline = load_pipeline(file, changes)
        again = shlex.join(["python", *sys.argv])
        return run_pipeline(pipeline, StepSelection(**options), command_line=again)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())

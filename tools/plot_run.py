"""Draw a run's curves, or several runs over each other, into a PNG."""

import argparse
import sys

from equilibrium_mcore.files.paths import report_path, user_path
from equilibrium_mcore.training.plot import plot_runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw loss, learning rates, gradient norm and throughput from metrics.jsonl.",
        epilog="example: python tools/plot_run.py runs/quickstart "
        "runs/quickstart_adamw --output comparison.png",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=user_path,
        metavar="RUN_DIR",
        help="a run's output directory (or its metrics.jsonl)",
    )
    parser.add_argument(
        "--output",
        type=report_path,
        metavar="FILE.png",
        help="where to draw (default: curves.png in the first RUN_DIR)",
    )
    arguments = parser.parse_args()
    try:
        output = plot_runs(arguments.runs, arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()

"""Draw a run's curves, or several runs over each other, into a PNG.

Loss, learning rates, gradient norm and throughput, from metrics.jsonl.

Example:
    {prog} runs/quickstart runs/quickstart_adamw --output comparison.png
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.files.paths import report_path, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and the picture."""
    add = parser.add_argument
    runs = "a run's output directory (or its metrics.jsonl)"
    add("runs", nargs="+", type=user_path, metavar="RUN_DIR", help=runs)
    where = "where to draw (default: curves.png in the first RUN_DIR)"
    add("--output", type=report_path, metavar="FILE.png", help=where)


def run(options: argparse.Namespace) -> None:
    """Draw."""
    from equilibrium_mcore.training.plot import plot_runs

    print(f"wrote {plot_runs(options.runs, options.output)}")

"""Print what Muon's Newton-Schulz costs in a training step, and how evenly ranks share it.

The model of MEASURED is trained for a few steps on this host, in one process, on made-up tokens,
and one update is raced against megatron-core's loop over matrices. The share of COUNTED, a layout
too large for this host, follows from counting operations.

Example:
    python tools/bench/optimizer.py --measured configs/runs/quickstart.yaml \\
        --counted configs/runs/pretrain_3b.yaml --world-size 64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.parallel import accelerator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run that is measured, and the one that is counted."""
    parser.add_argument("--measured", metavar="RUN", default="configs/runs/quickstart.yaml")
    parser.add_argument("--counted", metavar="RUN", default="configs/runs/pretrain_3b.yaml")
    parser.add_argument("--world-size", type=int, default=64, help="ranks of COUNTED; default 64")
    parser.add_argument("--steps", type=int, default=5, help="measured steps; default 5")


def run(options: argparse.Namespace) -> None:
    """Measure, count, print."""
    measured, counted = load_run(options.measured), load_run(options.counted)
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from tools.bench.measure import optimizer as benchmark

    share = benchmark.count_share(counted, options.world_size)
    print(benchmark.report_share(counted, share), end="\n\n", flush=True)
    print(benchmark.report(measured, *benchmark.measure(measured, steps=options.steps)))


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

"""Print what opening a blend costs: the ledger beside megatron-core's builder, in one run.

First a small dataset linked under many prefixes is opened both ways, then a few sources with very
many documents by the ledger alone; the data is made up, in a temporary folder that needs about 20
bytes for each document of one of those sources.

Examples:
    python tools/bench/data_ledger.py
    python tools/bench/data_ledger.py --prefixes 200 --samples 20000 --documents 1000000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.parallel import accelerator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of the made-up data."""
    add = parser.add_argument
    add("--prefixes", type=int, default=2000, help="small sources; default 2000")
    add("--samples", type=int, default=200_000, help="samples of the run; default 200000")
    add("--sources", type=int, default=64, help="large sources; default 64")
    add("--documents", type=int, default=10**9, help="their documents in all; default 10^9")
    add("--folder", type=user_path, help="where the temporary folder is made; default the system's")


def run(options: argparse.Namespace) -> None:
    """Measure, print."""
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from tools.bench.measure import ledger as benchmark

    sizes = vars(options)
    with tempfile.TemporaryDirectory(dir=sizes.pop("folder")) as folder:
        print(benchmark.report(*benchmark.measure(Path(folder), **sizes), **sizes))


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))

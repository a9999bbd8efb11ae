"""Accidents to a small run, drawn from a seed, until the time is up.

Each case starts a real run (two ranks, on the CPU), does something to it, runs the same command
again, and asks that the curve is bit for bit that of a run to which nothing happened, that nothing
is left over and nothing is lost. The status is 1 when a promise did not hold; the case is then
printed with the command that repeats it.

Examples:
    python -m tests.faults --seed 0 --minutes 5
    python -m tests.faults --seed 0 --only newest_damaged two_runs
    python -m tests.faults --seed 0 --case 7
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.bench import Bench, BrokenPromiseError
from tests.faults.scenarios import SCENARIOS


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, draw cases, print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="what is drawn (0)")
    add("--minutes", type=float, default=5, help="no case begins after so long (5)")
    add("--cases", type=int, help="at most so many cases")
    add("--case", type=int, metavar="N", help="this case alone")
    add("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    add("--folder", type=Path, help="keep the runs in this new folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="faults_") as temporary:
        return _campaign(options, (options.folder or Path(temporary)) / "runs")


def _campaign(options: argparse.Namespace, folder: Path) -> int:
    began = time.monotonic()
    names = options.only or list(SCENARIOS)
    bench = Bench(folder, say=lambda text: print(f"... {text}", flush=True))
    counts = {name: [0, 0] for name in names}
    number = -1 if options.case is None else options.case - 1
    while options.case is None or number < options.case:
        number += 1
        late = time.monotonic() - began > options.minutes * 60
        if options.case is None and (late or number == options.cases):
            break
        # Every scenario comes in turn; what happens in it depends on seed and number alone.
        name = names[number % len(names)]
        held = _case(bench, options.seed, number, name)
        counts[name][not held] += 1
    print("\n| accident | held | broken |\n|---|---:|---:|")
    for name, (held, broken) in counts.items():
        print(f"| {name} | {held} | {broken} |")
    return 1 if any(broken for _, broken in counts.values()) else 0


def _case(bench: Bench, seed: int, number: int, name: str) -> bool:
    began = time.monotonic()
    rng = random.Random(f"{seed} {number} {name}")
    try:
        told = SCENARIOS[name](bench, rng, f"case_{number}_{name}")
    except BrokenPromiseError as broken:
        print(f"BROKEN case {number}, {name}: {broken}", flush=True)
        print(f"again: python -m tests.faults --seed {seed} --only {name} --case {number}")
        return False
    print(f"held   case {number}, {name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())

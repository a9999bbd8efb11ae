"""Accidents to small runs and to tools, drawn from a seed; their counts.

Each case does something to a real command, gives the same command again, and asks for the promises
of docs/guides/reliability.md: the curve is bit for bit that of a run to which nothing happened, at
most the save interval is lost, an error is one message that names the file, nothing hangs. The
status is 1 when a promise did not hold; the case is printed with the command that repeats it.

With --results every case is a line of a file, and what the file holds of this seed is not done
again: the same command goes on where it was stopped. With --mended the cases that broke are done
once more; of a case with several lines the last counts.

Examples:
    python -m tests.faults --seed 0 --minutes 5
    python -m tests.faults --seed 0 --whole --minutes 600 --results results.jsonl
    python -m tests.faults --seed 0 --only kills signals --cases 10
    python -m tests.faults --seed 0 --only damaged --case 7
    python -m tests.faults --table results.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from equilibrium_mcore.files.json_lines import JsonLinesLog, read_log
from tests.faults.bench import Bench
from tests.faults.campaign import KINDS, Result, run_case
from tests.faults.table import newest, table


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, draw cases, print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    whole = ", ".join(f"{kind.target} {name}" for name, kind in KINDS.items())
    add("--seed", type=int, default=0, help="what is drawn (0)")
    add("--minutes", type=float, default=5, help="no case begins after so long (5)")
    add("--cases", type=int, help="at most so many cases of each kind")
    add("--whole", action="store_true", help=f"stop at these counts: {whole}")
    add("--case", type=int, metavar="N", help="this case alone, of the one kind in --only")
    add("--only", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    add("--results", type=Path, metavar="FILE", help="append to it, and do not repeat what it has")
    add("--mended", action="store_true", help="do the broken cases of the results again")
    add("--table", type=Path, metavar="FILE", help="only print the counts of a file of results")
    add("--folder", type=Path, help="keep the runs in this new folder")
    options = parser.parse_args(arguments)
    if options.case is not None and len(options.only or ()) != 1:
        parser.error("--case names a case of one kind: give that with --only")
    if options.table is not None:
        print(table(read_log(options.table)))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a background job of a shell ignores the first
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="faults_") as temporary:
        campaign = Campaign(options, (options.folder or Path(temporary)) / "runs")
        try:
            campaign.go()
        except KeyboardInterrupt:
            print("stopped; what is in the results is kept", file=sys.stderr)
        finally:
            campaign.close()
    print("\n" + table(campaign.results))
    return 1 if any(result["outcome"] == "broken" for result in campaign.results) else 0


class Campaign:
    """Cases of every kind in turn, until the time is up or the counts are reached."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self._folder = options, folder
        self._bench: Bench | None = None
        self._log = None
        self.results: list[Result] = []  # of this seed: of the file, and of this call
        if options.results is not None:
            if options.results.exists():
                found = newest(read_log(options.results))
                self.results = [result for result in found if result["seed"] == options.seed]
            self._log = JsonLinesLog(options.results)

    @property
    def bench(self) -> Bench:
        """Made for the first case that needs it."""
        if self._bench is None:
            self._bench = Bench(self._folder, say=lambda text: print(f"... {text}", flush=True))
        return self._bench

    def go(self) -> None:
        """Do cases. Raises KeyboardInterrupt."""
        began, options = time.monotonic(), self.options
        names = options.only or list(KINDS)
        if options.case is not None:
            return self._do(names[0], options.case)
        if options.mended:
            for result in [r for r in self.results if r["outcome"] == "broken"]:
                if result["kind"] in names:
                    self.results.remove(result)
                    self._do(result["kind"], result["number"])
            return None
        done = {(r["kind"], r["number"]) for r in self.results}
        counts = Counter()
        for result in self.results:
            counts[result["kind"]] += result["count"]
        numbers = dict.fromkeys(names, 0)
        while names:
            # The kind of which most is left, so that a call that is stopped has some of each.
            name = min(names, key=lambda n: counts[n] / KINDS[n].target)
            enough = options.whole and counts[name] >= KINDS[name].target
            if enough or numbers[name] == options.cases:
                names = [other for other in names if other != name]
                continue
            if time.monotonic() - began > options.minutes * 60:
                return None
            if (name, numbers[name]) not in done:
                counts[name] += self._do(name, numbers[name])
            numbers[name] += 1
        return None

    def _do(self, name: str, number: int) -> int:
        result = run_case(lambda: self.bench, self._folder, self.options.seed, name, number)
        self.results.append(result)
        if self._log is not None:
            self._log.append(result)
        head = f"{result['outcome']:7} {name} {number}"
        print(f"{head}: {result['what']} ({result['seconds']:.0f} s)", flush=True)
        if result["outcome"] == "broken":
            words = f"--seed {result['seed']} --only {name} --case {number}"
            print(f"again: python -m tests.faults {words}", flush=True)
        return result["count"]

    def close(self) -> None:
        """End what was started."""
        if self._bench is not None:
            self._bench.close()
        with contextlib.suppress(AttributeError):
            self._log.close()


if __name__ == "__main__":
    sys.exit(main())

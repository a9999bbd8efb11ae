"""Certify random runs: every setting that changes numbers, one layout of at most 4 ranks each.

Cases are drawn from a seed: a run on the quickstart's base with random values of every setting, a
layout, and 1, 2 or 4 threads for each rank. What the rules refuse is drawn again, without starting
a rank. Every case is certified by a process of its own, which is ended with its ranks after the
limit. The table says what passed, and how each case that did not is run again.

Examples:
    python tools/bench/certificates.py --count 100 --seed 0 --json results.json
    python tools/bench/certificates.py --seed 0 --case 17
    python tools/bench/certificates.py --seed 0 --case 17 --show > run.yaml

With --json finished cases are kept, and the same command continues after the last of them. The exit
status is 0 when every case passed or was refused, 1 when one did not, 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.cli.command import run_command, wrong_command_line
from equilibrium_mcore.config.yaml_io import to_yaml
from equilibrium_mcore.files.paths import report_path
from tools.bench.random_runs import cases, table
from tools.bench.random_runs.draw import draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases, and how they run."""
    add = parser.add_argument
    add("--count", type=int, default=100, help="cases 0 to COUNT - 1; default 100")
    add("--seed", type=int, default=0, help="what cases are drawn from; default 0")
    add("--case", type=int, metavar="N", help="certify case N alone, in this process")
    add("--show", action="store_true", help="with --case: print its run as YAML, start nothing")
    add("--json", type=report_path, metavar="OUT", help="results so far, or the case's certificate")
    add("--jobs", type=int, default=1, help="cases at a time; default 1")
    add("--limit-seconds", type=float, default=300, help="a longer case hangs; default 300")
    add(
        "--again",
        nargs="+",
        default=[],
        choices=[*cases.OUTCOMES.values(), cases.CRASH, cases.HANG],
        help="run finished cases of these outcomes again",
    )


def run(options: argparse.Namespace) -> int:
    """Run, print the table; 0 where every case passed or was refused, 1 where one did not."""
    if options.case is not None:
        return run_one(options)
    try:
        results = cases.Results(options.seed, options.json)
    except ValueError as error:
        raise wrong_command_line(str(error)) from None
    wanted = range(options.count)
    done = {n for n, r in results.by_number.items() if r.outcome not in options.again}
    try:
        cases.run_cases(
            results,
            [number for number in wanted if number not in done],
            jobs=options.jobs,
            limit_seconds=options.limit_seconds,
            progress=partial(say, count=options.count),
        )
    except KeyboardInterrupt:
        print(f"interrupted after {len(results.by_number)} cases", file=sys.stderr)
        raise
    found = [results.by_number[number] for number in wanted]
    print(table.as_markdown(found, seed=options.seed))
    return int(any(result.outcome in table.BAD for result in found))


def say(result: cases.Result, *, count: int) -> None:
    """A line for a case that has ended."""
    where = f"{result.layout}, {result.optimizer}, {result.threads} threads"
    words = f"case {result.number} of {count}: {result.outcome} ({where}; {result.seconds} s)"
    print(words + (f": {result.detail}" if result.detail else ""), file=sys.stderr, flush=True)


def run_one(options: argparse.Namespace) -> int:
    """Certify one case here; 0 for passed, 1 for not, 2 where it is refused when built."""
    drawn = draw(options.seed, options.case)
    if options.show:
        sys.stdout.write(to_yaml(drawn.config.model_dump(mode="json")))
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are processes of this host's CPU
    from equilibrium_mcore.parallel import accelerator

    accelerator.install()  # before megatron-core is imported
    accelerator.quiet_libraries()
    import torch

    from equilibrium_mcore.certify.certificate import certify, write_certificate
    from equilibrium_mcore.optim.param_groups import parameter_rows

    print(f"layout {drawn.layout.name}, {drawn.threads} threads a rank", flush=True)
    parameter_rows(drawn.config)  # an override that decides nothing is reported when built
    certificate = certify(
        drawn.config,
        [drawn.layout],
        prepare=partial(torch.set_num_threads, drawn.threads),
        everywhere=True,
        progress=lambda text: print(f"... {text}", flush=True),
    )
    print(certificate.table())
    if options.json:
        write_certificate(certificate, options.json)
    return 0 if certificate.passed else 1


if __name__ == "__main__":
    # Of a case anything but a refusal is a crash, with its traceback.
    raise SystemExit(run_command(__doc__, add_arguments, run, told=()))

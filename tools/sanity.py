"""The checks that save a week: run them on a run's config before you train it.

Each prints PASS, FAIL or SKIPPED with its figures, on one rank, on a laptop if need be; the exit
status is 1 when one fails. docs/reference/sanity.md tells what each catches.

Examples:
    python tools/sanity.py configs/runs/quickstart.yaml
    python tools/sanity.py my_run.yaml optimizer.muon.learning_rate=1e-3 --only gradients overfit
    python tools/sanity.py configs/runs/pretrain_3b.yaml --made-up-tokens --json sanity.json
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.files.paths import report_path, user_path
from equilibrium_mcore.parallel import accelerator


def main() -> int:
    """Parse the command line, run the ladder, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=user_path, metavar="CONFIG", help="a run, e.g. configs/runs/quickstart.yaml")
    add("overrides", nargs="*", metavar="key=value", help="settings, as for pretraining")
    add("--only", nargs="+", default=[], metavar="CHECK", help="run these checks alone")
    add("--made-up-tokens", action="store_true", help="read no data; its checks are skipped")
    add("--json", type=report_path, metavar="OUT", help="write verdicts and figures here too")
    options = parser.parse_intermixed_args()
    try:
        config = load_run(options.config, options.overrides)
        accelerator.quiet_libraries()
        accelerator.install()  # before megatron-core is imported
        from equilibrium_mcore.sanity.ladder import run_ladder

        report = run_ladder(
            config,
            only=options.only,
            made_up_tokens=options.made_up_tokens,
            show=lambda text: print(text, flush=True),
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.table()}")
    if options.json:
        report.write_json(options.json)
    return 1 if report.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

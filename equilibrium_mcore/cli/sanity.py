"""The checks that save a week: run them on a run's config before you train it.

Each prints PASS, FAIL or SKIPPED with its figures, on one rank, on a laptop if need be.
docs/reference/sanity.md tells what each catches.

Examples:
    {prog} configs/runs/quickstart.yaml
    {prog} my_run.yaml optimizer.muon.learning_rate=1e-3 --only gradients overfit
    {prog} configs/runs/pretrain_3b.yaml --made-up-tokens --json sanity.json

Exit status: 0 no check failed, 1 one did, 2 the config or the data cannot be read at all.
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.cli.command import FAILED
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.files.paths import report_path, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and which checks."""
    add = parser.add_argument
    add("config", type=user_path, metavar="CONFIG", help="a run, e.g. configs/runs/quickstart.yaml")
    add("overrides", nargs="*", metavar="key=value", help="settings, as for pretraining")
    add("--only", nargs="+", default=[], metavar="CHECK", help="run these checks alone")
    add("--made-up-tokens", action="store_true", help="read no data; its checks are skipped")
    add("--json", type=report_path, metavar="OUT", help="write verdicts and figures here too")


def run(options: argparse.Namespace) -> int:
    """Run the ladder, print the table; the exit status."""
    from equilibrium_mcore.config.load import load_run

    config = load_run(options.config, options.overrides)
    from equilibrium_mcore.parallel import accelerator

    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from equilibrium_mcore.sanity.ladder import run_ladder

    try:
        report = run_ladder(
            config,
            only=options.only,
            made_up_tokens=options.made_up_tokens,
            show=lambda text: print(text, flush=True),
        )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # of the data: no check failed, none could be made
        raise ConfigError(str(error), source=options.config) from None
    print(f"\n{report.table()}")
    if options.json:
        report.write_json(options.json)
    return FAILED if report.failed else 0

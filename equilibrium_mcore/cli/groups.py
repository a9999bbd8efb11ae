"""List what updates every parameter of a run: its optimizer, rate, decay and maps, and why.

The names are what `optimizer.overrides` matches; layers and experts that are treated alike share a
line, and --json has every parameter by itself. Of a run with adapters it says which matrix has one,
and why another has none. Nothing is trained: the model is built without memory.

Examples:
    {prog} configs/runs/pretrain_3b.yaml
    {prog} configs/runs/quickstart.yaml optimizer.matrices=soap
    {prog} configs/runs/quickstart.yaml \\
        'optimizer.overrides=[{pattern: "*.linear_kv_down_proj.weight", optimizer: adamw}]'
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and the form of the answer."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a run, e.g. configs/runs/quickstart.yaml")
    add("overrides", metavar="key=value", nargs="*", help="changed settings")
    add("--json", action="store_true", help="print a list, one entry a parameter")


def run(options: argparse.Namespace) -> None:
    """Describe, print."""
    from equilibrium_mcore.config.load import load_run

    config = load_run(options.config, options.overrides)
    from equilibrium_mcore.parallel import accelerator

    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from equilibrium_mcore.adapters.report import with_adapters
    from equilibrium_mcore.optim.param_groups import as_text, parameter_rows

    rows = with_adapters(parameter_rows(config), config)
    values = [row.as_dict() for row in rows]
    print(json.dumps(values, indent=2) if options.json else as_text(rows))

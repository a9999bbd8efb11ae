"""Print how many parameters a model has, and how many work on one token, by layer kind.

They are read off the real model, built without memory on torch's meta device.

Examples:
    {prog} equilibrium_3b
    {prog} configs/models/llama_1b.yaml --json
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the form of the answer."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a YAML file, or a name from configs/models")
    add("--json", action="store_true", help="print one object: total, active, by_kind")


def run(options: argparse.Namespace) -> None:
    """Count, print."""
    from equilibrium_mcore.config.load import load_model

    model = load_model(options.model)
    from equilibrium_mcore.parallel import accelerator

    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from equilibrium_mcore.models.parameters import count_parameters

    count = count_parameters(model)
    print(json.dumps(count.as_dict(), indent=2) if options.json else count.table())

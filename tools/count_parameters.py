"""Print how many parameters a model has, and how many work on one token, by layer kind.

They are read off the real model, built without memory on torch's meta device.

Examples:
    python tools/count_parameters.py equilibrium_3b
    python tools/count_parameters.py configs/models/llama_1b.yaml --json
"""

from __future__ import annotations

import argparse
import json
import sys

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.parallel import accelerator


def main() -> int:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a YAML file, or a name from configs/models")
    parser.add_argument(
        "--json", action="store_true", help="print one object: total, active, by_kind"
    )
    arguments = parser.parse_args()
    try:
        model = load_model(arguments.model)
        accelerator.quiet_libraries()
        accelerator.install()  # before megatron-core is imported
        from equilibrium_mcore.models.parameters import count_parameters

        count = count_parameters(model)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(count.as_dict(), indent=2) if arguments.json else count.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

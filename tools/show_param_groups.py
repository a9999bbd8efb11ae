"""List what updates every parameter of a run: optimizer, rate, decay, the maps it falls into, why.

The names are what `optimizer.overrides` matches; layers and experts that are treated alike share a
line, and --json has every parameter by itself. Nothing is trained: the model is built without
memory.

Examples:
    python tools/show_param_groups.py configs/runs/pretrain_3b.yaml
    python tools/show_param_groups.py configs/runs/quickstart.yaml optimizer.matrices=soap
    python tools/show_param_groups.py configs/runs/quickstart.yaml \\
        'optimizer.overrides=[{pattern: "*.linear_kv_down_proj.weight", optimizer: adamw}]'
"""

from __future__ import annotations

import argparse
import json
import sys

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.parallel import accelerator


def main() -> int:
    """Parse the command line, describe, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a run, e.g. configs/runs/quickstart.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changed settings")
    parser.add_argument("--json", action="store_true", help="print a list, one entry a parameter")
    arguments = parser.parse_args()
    try:
        config = load_run(arguments.config, arguments.overrides)
        accelerator.quiet_libraries()
        accelerator.install()  # before megatron-core is imported
        from equilibrium_mcore.optim.param_groups import as_text, parameter_rows

        rows = parameter_rows(config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    values = [row.as_dict() for row in rows]
    print(json.dumps(values, indent=2) if arguments.json else as_text(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

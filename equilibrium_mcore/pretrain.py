"""The main job: `python -m equilibrium_mcore.pretrain RUN.yaml [key=value ...]`."""

from __future__ import annotations

import os
import sys
from functools import partial

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run_config
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.launch import launch, place_from_environment
from equilibrium_mcore.training.run_folder import check_run_folder


def main(arguments: list[str]) -> int:
    """Check the config, then train in every rank; the exit status."""
    try:
        config = load_run_config(arguments, host=describe_host())
        place = place_from_environment(os.environ)
        if place is None or place.rank == 0:
            check_run_folder(config)  # before libraries take their seconds to import

        accelerator.install()  # before megatron-core is imported
        accelerator.quiet_libraries()
        from equilibrium_mcore.training.rank import train_rank

        return launch(config.parallelism, partial(train_rank, config=config))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

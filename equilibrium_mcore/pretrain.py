"""The main job: `python -m equilibrium_mcore.pretrain RUN.yaml [key=value ...]`."""

from __future__ import annotations

import os
import sys

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run_config
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.launch import Place, launch, place_from_environment
from equilibrium_mcore.training.run_folder import check_run_folder, owned_run_folder


def main(arguments: list[str]) -> int:
    """Check the config, then train in every rank; the exit status."""
    try:
        config = load_run_config(arguments, host=describe_host())
        place = place_from_environment(os.environ)
        if place is None or place.rank == 0:
            check_run_folder(config)  # before libraries take their seconds to import

        accelerator.install()  # before megatron-core is imported
        accelerator.quiet_libraries()
        from equilibrium_mcore.training.callbacks import build_callbacks
        from equilibrium_mcore.training.loop import train
        from equilibrium_mcore.training.setup import setup, teardown

        def run_rank(place: Place) -> None:
            with owned_run_folder(config, is_first_rank=place.rank == 0) as lock:
                run = setup(config, place)
                train(run, callbacks=build_callbacks(config, lock))
                teardown(run)

        return launch(config.parallelism, run_rank)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

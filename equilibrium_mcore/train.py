"""The main of every stage: `python -m equilibrium_mcore.train RUN.yaml [key=value ...]`."""

from __future__ import annotations

import os
import sys
from functools import partial

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run_config
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.errors import told_in_words
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.launch import launch, rank_info_from_environment
from equilibrium_mcore.parallel.rank_job import REFUSED
from equilibrium_mcore.training.run_folder import check_run_folder
from equilibrium_mcore.training.signals import take_signals_at_once


def main(arguments: list[str], *, program: str | None = None) -> int:
    """Check the config, then run its stage in every rank; the exit status.

    0 trained to its end, or stopped by a signal with all saved, which Slurm's scripts rely on; 2
    for settings that cannot be; 1 where a rank failed or the operating system refused something.
    `program` is what `--help` calls this.
    """
    try:
        config = load_run_config(
            arguments, host=describe_host(), program=program, also_check=check_without_starting
        )
        return run_stage(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except (OSError, RuntimeError, FloatingPointError) as error:
        if (text := told_in_words(error)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1


def check_without_starting(config: RunConfig, elsewhere: bool = False) -> None:
    """What `--check` asks beside the rules of the settings; notes go to stderr.

    `elsewhere`: the run is for another host. Raises ConfigError with every problem.
    """
    from equilibrium_mcore.hugging_face.tokenizer_check import print_tokenizer_notes
    from equilibrium_mcore.training.ready import check_ready

    check_ready(config, elsewhere=elsewhere, say=lambda text: print(text, file=sys.stderr))
    print_tokenizer_notes(config, sys.stderr)


def run_stage(config: RunConfig) -> int:
    """Run the stage of a checked config in every rank; the exit status.

    Raises ConfigError for an output directory that the run cannot have.
    """
    rank_info = rank_info_from_environment(os.environ)
    if rank_info is None or rank_info.rank == 0:
        check_run_folder(config)  # before libraries take their seconds to import

    accelerator.order_kernels(config.parallelism)
    accelerator.install()  # before megatron-core is imported
    accelerator.quiet_libraries()
    from equilibrium_mcore.stages.table import STAGE_RANKS

    return launch(config.parallelism, partial(STAGE_RANKS[config.stage], config=config))


if __name__ == "__main__":
    take_signals_at_once()
    sys.exit(main(sys.argv[1:]))

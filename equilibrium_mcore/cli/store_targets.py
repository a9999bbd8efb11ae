"""Store what a teacher says of every sample of a run, so that the run loads no teacher.

Example:
    {prog} configs/runs/distill.yaml objective.targets=runs/distill/targets
    {run} configs/runs/distill.yaml objective.targets=runs/distill/targets

For each position the likeliest ids (objective.top_k) and the rest as one bin, of the teacher that
objective.teacher names, at objective.temperature. It runs in the layout of the run file, under a
launcher too. A killed one goes on where it was; other data, packing, settings or weights of the
teacher need another folder.

Exit status: 0 stored, 1 a rank failed, 2 settings that cannot be.
"""

from __future__ import annotations

import argparse
from functools import partial

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    add = parser.add_argument
    add("config", type=user_path, metavar="RUN", help="a run of stage distill")
    add("overrides", nargs="*", metavar="key=value", help="settings, as for training")


def run(options: argparse.Namespace) -> int:
    """Store the targets in every rank; the exit status."""
    from equilibrium_mcore.config.load import load_run
    from equilibrium_mcore.config.objectives import DistillationConfig

    config = load_run(options.config, options.overrides)
    objective = config.objective
    if not isinstance(objective, DistillationConfig):
        raise ConfigError(
            f"stage={config.stage!r} has no teacher: name a run of stage distill",
            source=options.config,
        )
    for key in ("teacher", "targets"):
        if getattr(objective, key) is None:
            raise ConfigError(
                f"objective.{key}: missing: targets are what objective.teacher says, stored in the "
                "folder objective.targets",
                source=options.config,
            )
    from equilibrium_mcore.parallel import accelerator

    accelerator.order_kernels(config.parallelism)
    accelerator.install()  # before megatron-core is imported
    accelerator.quiet_libraries()
    from equilibrium_mcore.parallel.launch import launch
    from equilibrium_mcore.training.store_targets import store_rank

    return launch(config.parallelism, partial(store_rank, config=config))

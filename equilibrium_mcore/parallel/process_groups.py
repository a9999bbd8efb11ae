"""torch.distributed and megatron-core's process groups.

The only module that touches `megatron.core.parallel_state`. Everything else is given a
`ProcessGroupCollection`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from equilibrium_mcore.config.layout import megatron_sizes
from equilibrium_mcore.config.schema import ParallelismConfig
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.rank_job import RankInfo
from equilibrium_mcore.parallel.rendezvous import meeting

# Within a node: tensor, then context, then expert; pipeline stages lie furthest apart.
RANK_ORDER = "tp-cp-ep-dp-pp"


def join(rank_info: RankInfo, layout: ParallelismConfig, *, seed: int) -> ProcessGroupCollection:
    """Take this rank's place: the default group, the groups of `layout`, and seeds. Collective."""
    with meeting(rank_info, timeout_minutes=layout.timeout_minutes):
        initialize_distributed(
            rank=rank_info.rank,
            world_size=rank_info.world_size,
            local_rank=rank_info.local_rank,
            timeout_minutes=layout.timeout_minutes,
            init_method=rank_info.init_method,
        )
    groups = initialize_groups(layout)
    seed_everything(seed)
    return groups


@contextlib.contextmanager
def one_rank(*, seed: int) -> Iterator[ProcessGroupCollection]:
    """This process as a world of one rank: groups and seeds, left at the end. No port, no file.

    A whole run of one rank is `training.setup.run_alone`. Raises RuntimeError where this process
    is a rank already.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("process groups exist already: do this in a process of its own")
    try:
        yield join(RankInfo.alone(), ParallelismConfig(), seed=seed)
    finally:
        destroy()


def initialize_groups(layout: ParallelismConfig) -> ProcessGroupCollection:
    """Build the process groups of `layout` over the ranks of the default group.

    torch.distributed must be initialised, and its size must be a multiple of
    tensor * pipeline * context (`config.rules` has checked it).
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        **megatron_sizes(layout),
        distributed_timeout_minutes=layout.timeout_minutes,
        order=RANK_ORDER,
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def initialize_distributed(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    timeout_minutes: int,
    init_method: str = "env://",
) -> None:
    """Join the default process group; on a CUDA host, take GPU `local_rank`.

    A rank that is alone (`init_method` "") meets nobody: no port, no file.
    """
    if accelerator.has_cuda():
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(
        backend=accelerator.communication_backend(),
        init_method=init_method or None,
        store=None if init_method else torch.distributed.HashStore(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=accelerator.device() if accelerator.has_cuda() else None,
    )


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch, and megatron-core's trackers per tensor and expert rank."""
    import random

    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy() -> None:
    """Leave all groups; safe to call twice."""
    # What megatron-core keeps of MoE layers for the process has the shapes of its first model, and
    # need not fit the next one: a figure for each layer, and the scale of the balancing loss.
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_virtual_stage(stage: int | None) -> None:
    """Tell megatron-core which model chunk is being built (it still reads this globally)."""
    parallel_state.set_virtual_pipeline_model_parallel_rank(stage)

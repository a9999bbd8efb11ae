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
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs
from megatron.core.transformer.moe.fused_a2a import reset_hybrid_ep_buffer

from equilibrium_mcore.config.layout import megatron_sizes
from equilibrium_mcore.config.schema import ParallelismConfig
from equilibrium_mcore.parallel import accelerator, object_group
from equilibrium_mcore.parallel.rank_job import RankInfo
from equilibrium_mcore.parallel.rendezvous import meeting

# Within a node: tensor, then context, then expert; pipeline stages lie furthest apart.
RANK_ORDER = "tp-cp-ep-dp-pp"


def join(
    rank_info: RankInfo, layout: ParallelismConfig, *, seed: int, graphs: bool = False
) -> ProcessGroupCollection:
    """Take this rank's place: the default group, the groups of `layout`, and seeds. Collective.

    With `graphs` random states are of the kind that CUDA graphs can hold.
    """
    with meeting(rank_info, timeout_minutes=layout.timeout_minutes):
        initialize_distributed(
            rank=rank_info.rank,
            world_size=rank_info.world_size,
            local_rank=rank_info.local_rank,
            timeout_minutes=layout.timeout_minutes,
            init_method=rank_info.init_method,
        )
    groups = initialize_groups(layout)
    seed_everything(seed, graphs=graphs)
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

    On a CUDA host all groups are NCCL's, and begin to communicate when they are first used: bound
    to a device from the start (`device_id`), each would be split off at once, by every rank of the
    job, member or not. One more group of all ranks is gloo's, for objects.
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
    )
    if accelerator.has_cuda():
        object_group.create(timeout_minutes=timeout_minutes)


def seed_everything(seed: int, *, graphs: bool = False) -> None:
    """Seed python, numpy and torch, and megatron-core's trackers per tensor and expert rank."""
    import random

    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True, use_cudagraphable_rng=graphs)


def destroy() -> None:
    """Leave all groups; safe to call twice."""
    object_group.forget()
    if CudaGraphManager.global_mempool is not None:
        delete_cuda_graphs()
    reset_hybrid_ep_buffer()  # HybridEP's belongs to a group, and is kept for the process
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_virtual_stage(stage: int | None) -> None:
    """Tell megatron-core which model chunk is being built (it still reads this globally)."""
    parallel_state.set_virtual_pipeline_model_parallel_rank(stage)

"""A model whose weights do not change: a reference, a teacher, a reward model."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from equilibrium_mcore.checkpoint.choose import INITIAL_WEIGHTS, open_weights_together
from equilibrium_mcore.checkpoint.sharded import load_weights
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.random_states import kept_random_states
from equilibrium_mcore.training.frozen_settings import settings_of_frozen
from equilibrium_mcore.training.setup import build_chunks


def load_frozen(
    weights: Path, *, config: RunConfig, groups: ProcessGroupCollection, key: str = INITIAL_WEIGHTS
) -> list[torch.nn.Module]:
    """This rank's chunks of the model in `weights`, in the layout of the run `config`. Collective.

    `weights` is a run's output directory or one of its checkpoints, of any layout, which the
    setting `key` names. Its model may be another than the run's, of the same vocabulary: a teacher.
    The chunks are in eval mode, without gradients, their buffers, DDP or optimizer: their memory is
    that of the weights. Random states are those from before.

    Raises ConfigError where there is no checkpoint, or its model does not fit layout or
    vocabulary, and DamagedCheckpointError.
    """
    opened = open_weights_together(weights, verify=config.checkpoint.verify, key=key)
    wanted, opened = settings_of_frozen(
        opened, config=config, world_size=torch.distributed.get_world_size()
    )
    with kept_random_states():
        _, chunks = build_chunks(wanted, groups, trainable=False)
    load_weights(opened, config=wanted, chunks=chunks, groups=groups)
    return chunks

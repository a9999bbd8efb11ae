"""A model whose weights do not change: a reference, a teacher, a reward model."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from equilibrium_mcore.checkpoint.choose import open_weights_together
from equilibrium_mcore.checkpoint.sharded import load_weights
from equilibrium_mcore.config import rules
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.pattern import layers_of
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.random_states import kept_random_states
from equilibrium_mcore.training.setup import build_chunks


def load_frozen(
    weights: Path, *, config: RunConfig, groups: ProcessGroupCollection
) -> list[torch.nn.Module]:
    """This rank's chunks of the model in `weights`, in the layout of the run `config`. Collective.

    `weights` is a run's output directory or one of its checkpoints, of any layout. Its model may be
    another than the run's, of the same vocabulary: a teacher. The chunks are in eval mode, without
    gradients, their buffers, DDP or optimizer: their memory is that of the weights. Random states
    are those from before.

    Raises ConfigError where there is no checkpoint, or its model does not fit layout or
    vocabulary, and DamagedCheckpointError.
    """
    opened = open_weights_together(weights, verify=config.checkpoint.verify)
    model = opened.config.model
    if model.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{opened.path}: model.vocab_size={model.vocab_size} of the frozen model, and "
            f"{config.model.vocab_size} of the run: both must read the same tokens"
        )
    if layers_of(model.layer_pattern) == layers_of(config.model.layer_pattern):
        # The run's cuts fit its pipeline; those that the weights were saved under need not.
        model = model.model_copy(update={"layer_pattern": config.model.layer_pattern})
    if model.moe is not None:  # nothing balances experts that do not train
        still = model.moe.model_copy(update={"load_balancing": "none"})
        model = model.model_copy(update={"moe": still})
    wanted = config.model_copy(update={"model": model})
    # Its head is that of another objective than the run's.
    fits = wanted.model_copy(update={"model": model.model_copy(update={"head": config.model.head})})
    if problems := rules.check(fits, world_size=torch.distributed.get_world_size()):
        raise ConfigError(problems, source=f"the model of {opened.path} in this run's layout")
    with kept_random_states():
        _, chunks = build_chunks(wanted, groups, trainable=False)
    load_weights(opened, config=wanted, chunks=chunks, groups=groups)
    return chunks

"""The settings under which another run's model stands, frozen, in a run's layout."""

from __future__ import annotations

from dataclasses import replace

from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint
from equilibrium_mcore.config import rules
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.heads import has_scalar_head
from equilibrium_mcore.config.layout import pipeline_segments
from equilibrium_mcore.config.pattern import balanced_cuts, cut_into, layers_of
from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.data.tokenizer import load_tokenizer


def settings_of_frozen(
    opened: OpenedCheckpoint, *, config: RunConfig, world_size: int | None = None
) -> tuple[RunConfig, OpenedCheckpoint]:
    """The run `config` with the model of the checkpoint, and the checkpoint as if saved so.

    The vocabulary is padded as the run's, so that tensor ranks hold the same tokens of both; the
    pipeline's cuts are the run's where the layers are, else the checkpoint's own, else even ones.
    Adapters and frozen parameters of the run are left out: they name the run's own layers.

    Raises ConfigError for another vocabulary, and for a model that does not fit the layout.
    """
    model = opened.config.model
    if model.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{opened.path}: model.vocab_size={model.vocab_size} of the frozen model, and "
            f"{config.model.vocab_size} of the run: both must read the same tokens"
        )
    padded = {"vocab_size_multiple": config.model.vocab_size_multiple}
    model = model.model_copy(update={**padded, "layer_pattern": _pattern(model, config)})
    if model.moe is not None:  # nothing balances experts that do not train
        still = {
            "load_balancing": "none",
            "z_loss_coefficient": 0.0,
            "expert_bias_update_rate": 0.0,
        }
        model = model.model_copy(update={"moe": model.moe.model_copy(update=still)})
    training = config.training.model_copy(update={"frozen": []})
    wanted = config.model_copy(update={"model": model, "adapters": None, "training": training})
    # Its head is that of another objective than the run's.
    fits = wanted.model_copy(update={"model": model.model_copy(update={"head": config.model.head})})
    if problems := rules.check(fits, world_size=world_size):
        raise ConfigError(problems, source=f"the model of {opened.path} in this run's layout")
    saved = opened.config.model.model_copy(update=padded)
    return wanted, replace(opened, config=opened.config.model_copy(update={"model": saved}))


def check_same_tokenizer(opened: OpenedCheckpoint, config: RunConfig) -> str | None:
    """Raise ConfigError where the checkpoint's run reads text by another tokenizer than `config`.

    Returns why they could not be compared, if they could not: a tokenizer that is not on this host.
    """
    theirs, ours = opened.config.data.tokenizer, config.data.tokenizer
    try:
        both = [load_tokenizer(settings) for settings in (theirs, ours)]
    except (OSError, ValueError) as error:
        return f"the tokenizer of {opened.path} was not compared with the run's: {error}"
    if both[0].fingerprint != both[1].fingerprint:
        raise ConfigError(
            f"{opened.path}: its run's tokenizer is {theirs.model}, and that of this run, "
            f"{ours.model}, is another: an id would mean two things. Use one tokenizer for both"
        )
    return None


def check_reward_model(opened: OpenedCheckpoint, config: RunConfig, *, key: str) -> None:
    """Raise ConfigError unless the checkpoint gives scores, and reads the tokens of `config`.

    A tokenizer that is not there to be compared is refused as well: scores of tokens that mean
    something else look like any others.
    """
    if not has_scalar_head(opened.config.model):
        raise ConfigError(
            f"{key}: {opened.path} predicts tokens and gives no scores: name a run of stage "
            "reward_model"
        )
    if (unknown := check_same_tokenizer(opened, config)) is not None:
        raise ConfigError(
            f"{key}: {unknown}; put it back where the reward model's config names it, or link it"
        )


def _pattern(model: ModelConfig, config: RunConfig) -> str:
    if layers_of(model.layer_pattern) == layers_of(config.model.layer_pattern):
        # The run's cuts fit its pipeline; those that the weights were saved under need not.
        return config.model.layer_pattern
    stages = pipeline_segments(config.parallelism)
    try:
        return cut_into(model.layer_pattern, stages)
    except ValueError:
        return balanced_cuts(model.layer_pattern, stages)

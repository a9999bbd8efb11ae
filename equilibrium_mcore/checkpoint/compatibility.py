"""Whether a run may resume from a checkpoint: the settings that its state depends on."""

from __future__ import annotations

from typing import Any

from equilibrium_mcore.config.chat import ChatsConfig
from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.heads import has_output
from equilibrium_mcore.config.layout import train_samples
from equilibrium_mcore.config.optimizers import OPTIMIZERS
from equilibrium_mcore.config.pattern import layers_of
from equilibrium_mcore.config.schema import RunConfig

# How the experts are kept evenly used belongs to training, though the model's section holds it.
BALANCING = {
    "model.moe.load_balancing",
    "model.moe.aux_loss_coefficient",
    "model.moe.z_loss_coefficient",
    "model.moe.expert_bias_update_rate",
}
VOCABULARY = "model.vocab_size"
HEAD = "model.head"
# Settings that may differ although they lie in a section that must not.
FREE = {"model.name", "model.mamba.chunk_size", *BALANCING}
# Why a setting of the data must not change, where it is not plain.
REASONS = {
    "stage": "another stage is another run, which starts from the weights of this one",
    "data.order": "the two orders have nothing in common, so documents would come twice",
    "data.split": "documents would move between training and validation",
    "training.seed": "it orders the documents, and another order would bring some of them twice",
}


def check_resumable(saved: RunConfig, wanted: RunConfig, *, checkpoint: str) -> None:
    """Raise ConfigError with every setting that differs and must not. The layout may differ."""
    problems = []
    before, now = _bound(saved), _bound(wanted)
    horizon, asked = train_samples(saved), train_samples(wanted)
    baked = _is_baked(saved) and _is_baked(wanted)
    if baked:
        before, now = {**before, **_baked(saved)}, {**now, **_baked(wanted)}
    if baked and horizon != asked:
        # megatron-core shuffles for a given number of samples: another number is another order, in
        # which documents that were seen come again and others never come.
        problems.append(
            f"the data would be ordered for {asked} sequences (data.train_samples, or "
            f"training.steps * training.global_batch_size), the checkpoint's for {horizon}: set "
            f"data.train_samples={horizon}, which allows any number of steps up to it, or start a "
            f"new run in another output_directory with checkpoint.initial_weights={checkpoint}"
        )
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            reason = f" ({REASONS[key]})" if key in REASONS else ""
            problems.append(
                f"{key}={now.get(key)!r} differs from the checkpoint's {before.get(key)!r}{reason}"
                ": put it back, or start a new run in another output_directory with "
                f"checkpoint.initial_weights={checkpoint}"
            )
    if problems:
        raise ConfigError(problems, source=f"resuming from {checkpoint}")


def check_same_model(saved: RunConfig, wanted: RunConfig, *, checkpoint: str) -> None:
    """Raise ConfigError with every difference between the models, for weights alone.

    The vocabulary may be larger than it was: `checkpoint/vocabulary.py` fills the new rows. A
    scalar head may be new, and the output layer may be left away.
    """
    before, now = _model(saved), _model(wanted)
    problems = []
    had_head, head = before.pop(HEAD), now.pop(HEAD)
    lacks_output = has_output(wanted.model) and not has_output(saved.model)
    if lacks_output and not wanted.model.tie_embeddings:
        problems.append(
            f"{HEAD}={head!r}, but the weights have {HEAD}={had_head!r} and no output layer, which "
            f"would be random: set {HEAD}: scalar, or name the weights that they were trained from"
        )
    had, has = before.pop(VOCABULARY), now.pop(VOCABULARY)
    if has < had:
        problems.append(
            f"{VOCABULARY}={has} is less than the {had} of the weights: rows of tokens would be "
            f"lost, and a tokenizer only grows. Set it to {had}, or to more for a tokenizer with "
            "new tokens"
        )
    problems += [
        f"{key}={now.get(key)!r} differs from the {before.get(key)!r} of the weights: name the "
        "model that they were trained with"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if problems:
        raise ConfigError(problems, source=f"checkpoint.initial_weights={checkpoint}")


def noted_changes(saved: RunConfig, wanted: RunConfig, *, resumed: bool) -> dict[str, str]:
    """Settings that may change and whose change is worth a line in the log: `before -> now`."""
    before, now = (_flatten(c.model.model_dump(mode="json"), "model") for c in (saved, wanted))
    keys = [key for key in sorted(BALANCING) if key in before and key in now]
    if resumed:
        keys.append("training.frozen")
        before["training.frozen"], now["training.frozen"] = (
            c.training.frozen for c in (saved, wanted)
        )
    return {key: f"{before[key]} -> {now[key]}" for key in keys if before[key] != now[key]}


def grown_vocabulary(saved: RunConfig, wanted: RunConfig) -> dict[str, str]:
    """What is to be said of a vocabulary that is larger than the weights'; empty where it is not"""
    old, new = saved.model, wanted.model
    if new.vocab_size <= old.vocab_size:
        return {}
    return {
        "tokens": f"{old.vocab_size} -> {new.vocab_size}",
        "rows": f"{old.padded_vocab_size} -> {new.padded_vocab_size}",
        "new_rows": "the mean of the old ones",
    }


def _model(config: RunConfig) -> dict[str, Any]:
    values = _flatten(config.model.model_dump(mode="json"), "model")
    values["model.layer_pattern"] = layers_of(config.model.layer_pattern)
    return {key: value for key, value in values.items() if key not in FREE}


def _bound(config: RunConfig) -> dict[str, Any]:
    """What the saved state was made with: shapes, kinds of state, and the order of the data."""
    return {
        **_model(config),
        **_optimizer_state(config),
        "training.precision": config.training.precision,
        "training.seed": config.training.seed,
        "stage": config.stage,
        "adapters": config.model_dump(mode="json", include={"adapters"})["adapters"],
        "data.type": config.data.type,
        **_data_order(config.data),
    }


def _data_order(data: DataConfig | ChatsConfig) -> dict[str, Any]:
    """Conversations are identified by their hash, when the datasets are built."""
    if isinstance(data, ChatsConfig):
        return {}
    return {"data.order": data.order, "data.split": data.split}


def _is_baked(config: RunConfig) -> bool:
    return isinstance(config.data, DataConfig) and config.data.order == "megatron"


def _baked(config: RunConfig) -> dict[str, Any]:
    """What megatron-core's order is made for. A ledger resumes at its cursors under any of these"""
    return {
        "training.sequence_length": config.training.sequence_length,
        "data.sources": {source.name: source.weight for source in config.data.sources},
    }


def _optimizer_state(config: RunConfig) -> dict[str, Any]:
    """Settings that decide which state tensors there are, and their shapes."""
    optimizer = config.optimizer
    chosen = {o.pattern: (o.optimizer, o.split) for o in optimizer.overrides}
    bound = {
        "optimizer.matrices": optimizer.matrices,
        "optimizer.overrides": {p: c for p, c in chosen.items() if c != (None, None)},
        "optimizer.schedule_free": "null" if optimizer.schedule_free is None else "used",
    }
    for name in optimizer.used:
        for key in OPTIMIZERS[name].state_settings:
            bound[f"optimizer.{name}.{key}"] = getattr(getattr(optimizer, name), key)
    return bound


def _flatten(values: dict, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}"
        flat.update(_flatten(value, name) if isinstance(value, dict) else {name: value})
    return flat

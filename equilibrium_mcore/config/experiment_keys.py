"""The keys of an experiment file, and the settings of a run that each stands for.

An experiment file has the sections `experiment`, `model`, `data`, `training`, `checkpointing` and
`logging`; its keys are those of common trainers. What no key says is set under `run:`, in the
names of `schema.py`. What several keys say together is in `experiment_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from equilibrium_mcore.config.optimizers import OPTIMIZERS


class Key(NamedTuple):
    """A key: the settings that it gives a value, and what it means.

    `convert` makes the settings' values of the key's; without it all get the value as it is. It
    raises ValueError with the rule. `run:` may set one of several settings otherwise.
    """

    settings: tuple[str, ...]
    meaning: str
    convert: Callable[[Any], Mapping[str, Any]] | None = None


def _precision(value: Any) -> dict[str, Any]:
    # `no` is text in YAML 1.2, and false is what YAML 1.1 made of it.
    return {"training.precision": "fp32" if value in ("no", False) else value}


def _betas(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("must be two numbers, e.g. [0.9, 0.95]")
    return {"optimizer.adamw.beta1": value[0], "optimizer.adamw.beta2": value[1]}


def _true_or_false(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return {}


def _positive(value: Any) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("must be a whole number above 0")
    return {}


def _path(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        raise ValueError("must be a path or a name, as text")
    return {}


def _of_each(name: str) -> tuple[str, ...]:
    """A setting that every optimizer has."""
    return tuple(f"optimizer.{optimizer}.{name}" for optimizer in OPTIMIZERS)


KEYS: dict[str, Key] = {
    "experiment.name": Key(("name",), "name of the run"),
    "experiment.description": Key(("description",), "what the run is for"),
    "experiment.tags": Key(("tags",), "words to find the run by"),
    "model.config_path": Key(
        ("model",), "the model: a file, or its name, `llama/1b`; null: that of the weights", _path
    ),
    "model.from_scratch": Key(
        ("checkpoint.initial_weights",),
        "true: random weights; false: those of `model.checkpoint_path`",
        _true_or_false,
    ),
    "model.checkpoint_path": Key(
        ("checkpoint.initial_weights",), "a run's output directory, or one of its checkpoints"
    ),
    "data.config_path": Key(
        ("data",), "a mixture, by file or name, or the data itself: a blend, conversations", _path
    ),
    "data.prepared": Key(
        ("data",), "the folder where the mixture was prepared; null: data/ and its name", _path
    ),
    "data.num_workers": Key(("data.num_workers",), "loader processes per rank"),
    "data.prefetch_factor": Key(("data.prefetch_factor",), "micro-batches that each has ready"),
    "training.batch_size": Key(
        ("training.global_batch_size",), "sequences per optimizer step, over all ranks"
    ),
    "training.gradient_accumulation_steps": Key(
        ("training.micro_batch_size",),
        "forward passes per optimizer step on a data-parallel rank; the micro-batch follows",
        _positive,
    ),
    "training.max_steps": Key(("training.steps",), "optimizer steps of the whole run"),
    "training.epochs": Key(("training.epochs",), "instead of max_steps: passes over the data"),
    "training.learning_rate": Key(_of_each("learning_rate"), "peak rate of every optimizer"),
    "training.warmup_steps": Key(("optimizer.schedule.warmup_steps",), "linear rise from 0"),
    "training.lr_scheduler": Key(("optimizer.schedule.kind",), "cosine, wsd or constant"),
    "training.weight_decay": Key(_of_each("weight_decay"), "decay of every optimizer, decoupled"),
    "training.grad_clip": Key(("optimizer.clip_gradient_norm",), "global norm; 0: never"),
    "training.optimizer": Key(
        ("optimizer.matrices",), f"of the weight matrices: {', '.join(OPTIMIZERS)}"
    ),
    "training.betas": Key(
        ("optimizer.adamw.beta1", "optimizer.adamw.beta2"), "AdamW's two decays", _betas
    ),
    "training.eps": Key(("optimizer.adamw.epsilon",), "AdamW's epsilon"),
    "training.mixed_precision": Key(
        ("training.precision",), "bf16, fp16, fp8; no or fp32: none", _precision
    ),
    "training.use_ddp": Key(
        ("parallelism.world_size",),
        "false: one rank; true is how several ranks train anyway",
        _true_or_false,
    ),
    "training.world_size": Key(
        ("parallelism.world_size",), "ranks in all; null: as many as the launcher starts"
    ),
    "checkpointing.save_steps": Key(("checkpoint.save_interval_steps",), "steps between saves"),
    "checkpointing.save_total_limit": Key(("checkpoint.keep_last",), "checkpoints that stay"),
    "checkpointing.output_dir": Key(("output_directory",), "the experiment's folder"),
    "logging.log_steps": Key(("logging.interval_steps",), "steps between two log lines"),
    "logging.eval_steps": Key(
        ("training.validation_interval_steps",), "steps between validations; 0: never"
    ),
    "logging.use_wandb": Key(
        ("logging.wandb_project",), "false: no Weights & Biases", _true_or_false
    ),
    "logging.wandb_project": Key(("logging.wandb_project",), "the project there"),
    "logging.wandb_run_name": Key(("logging.wandb_run_name",), "the run's name there"),
}
# Keys that only make sense with others; `experiment_rules.py` gives their settings values.
TOGETHER = {
    "model.config_path",
    "model.from_scratch",
    "model.checkpoint_path",
    "data.config_path",
    "data.prepared",
    "training.gradient_accumulation_steps",
    "training.use_ddp",
    "logging.use_wandb",
    "logging.wandb_project",
}
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in KEYS))
OWN = "run"  # the section of settings in their own names


def converted(key: str, value: Any) -> Mapping[str, Any]:
    """The settings that the key gives a value by itself. Raises ValueError with the rule."""
    entry = KEYS[key]
    if entry.convert is not None:
        return entry.convert(value)
    return {} if key in TOGETHER else dict.fromkeys(entry.settings, value)

"""What several keys of an experiment file say together: weights, data, batch, ranks, logging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from equilibrium_mcore.config import layout
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.config.mixture_files import find_mixture, prepared_data
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.references import find_file, resolve
from equilibrium_mcore.config.rule_kit import choices
from equilibrium_mcore.config.schema import ParallelismConfig
from equilibrium_mcore.config.stages import STAGES
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.files.paths import expand_path

KeyValues = Mapping[str, Any]  # what the file says; keys without a value are left out


def weights(given: KeyValues) -> Any:
    """`checkpoint.initial_weights`. Raises ConfigError where the two keys contradict."""
    scratch, path = given.get("model.from_scratch"), given.get("model.checkpoint_path")
    if scratch is True and path is not None:
        raise ConfigError(
            f"model.from_scratch=true, but model.checkpoint_path={path!r} gives weights to start "
            "from: set model.from_scratch=false, or leave the path out"
        )
    if scratch is False and path is None:
        raise ConfigError(
            "model.from_scratch=false, but no model.checkpoint_path says where the weights are: "
            f"name a run's output directory (`{command('train')}`: --initial_weights), or set "
            "model.from_scratch=true"
        )
    return path


def model(given: KeyValues) -> dict[str, Any]:
    """The model's section: a file, or the model that the weights were trained with."""
    name = given.get("model.config_path")
    if isinstance(name, str):
        return {"from": name}
    path = given.get("model.checkpoint_path")
    if path is None:
        raise ConfigError(
            "model.config_path: missing: name a model, e.g. llama/1b, or give the weights of a run "
            "as model.checkpoint_path, whose model is then taken"
        )
    return _run_of_weights(path)["model"]


def data(given: KeyValues, *, stage: str, folder: Path) -> dict[str, Any]:
    """The data's section: of a mixture, the file that preparing it wrote.

    It is of the kind that the stage trains on. Conversations that name no tokenizer have that of
    the weights.
    """
    name, place = given.get("data.config_path"), given.get("data.prepared")
    if not isinstance(name, str):
        raise ConfigError(
            "data.config_path: missing: name a mixture, e.g. pretrain/phase1/mixture1, or a file "
            "that is data, e.g. the blend.yaml of a prepared folder"
        )
    file = _data_file(name, folder)
    if "datasets" in read_mapping(file):
        file = prepared_data(file, None if place is None else _expand(place, "data.prepared"))
    elif place is not None:
        raise ConfigError(
            f"data.prepared={place!r}: {file} is data already, and no mixture: leave it out"
        )
    section = resolve(str(file.resolve()), kind="data", folder=folder)
    section = {"type": _kind(section), **section}
    if stage in STAGES and section["type"] not in STAGES[stage].takes:
        raise ConfigError(
            f"data.config_path={name!r} is {section['type']}, but stage {stage!r} trains on "
            f"{' or '.join(STAGES[stage].takes)}: name such data, or another stage"
        )
    path = given.get("model.checkpoint_path")
    if path is not None and "tokenizer" not in section:
        section["tokenizer"] = _run_of_weights(path)["data"]["tokenizer"]
    return section


def ranks(given: KeyValues) -> Iterator[str]:
    """`use_ddp` and `world_size`."""
    size = given.get("training.world_size")
    if given.get("training.use_ddp") is False and size not in (None, 1):
        yield (
            f"training.use_ddp=false, but training.world_size={size}: several ranks always share "
            "the batch; set training.use_ddp=true, or training.world_size=1"
        )


def logging(given: KeyValues) -> dict[str, Any]:
    """`logging.wandb_project`, where Weights & Biases is wanted."""
    wanted, project = given.get("logging.use_wandb"), given.get("logging.wandb_project")
    if wanted is True and project is None:
        raise ConfigError(
            "logging.use_wandb=true, but logging.wandb_project names no project: name one, or set "
            "logging.use_wandb=false"
        )
    return {"logging.wandb_project": None if wanted is False else project}


def micro_batch(given: KeyValues, values: KeyValues, launched: int | None) -> int | None:
    """The micro-batch with which the keys' accumulation gives their batch.

    `values` are the run's, with all changes. None where there is nothing to compute, or where a
    value is wrong that the schema will tell of. Raises ConfigError with the arithmetic.
    """
    steps = given.get("training.gradient_accumulation_steps")
    training = values.get("training", {})
    batch = training.get("global_batch_size")
    place = parse(ParallelismConfig, values.get("parallelism") or {})
    if not _is_count(steps) or not _is_count(batch) or isinstance(place, list):
        return None
    world, split = layout.resolve_world_size(place, launched), layout.model_parallel_size(place)
    if world % split:
        return None
    data_ranks = world // split
    arithmetic = (
        f"gradient_accumulation_steps={steps} * {data_ranks} data-parallel rank(s) (world_size "
        f"{world} / (tensor {place.tensor} * pipeline {place.pipeline} * context {place.context}))"
    )
    micro, rest = divmod(batch, steps * data_ranks)
    if rest or not micro:
        raise ConfigError(
            f"training.batch_size={batch} is not a multiple of {arithmetic} = "
            f"{steps * data_ranks} sequences, one each: {_ways_out(batch, steps, data_ranks)}"
        )
    own = training.get("micro_batch_size")
    if own not in (None, micro):
        raise ConfigError(
            f"training.batch_size={batch} / ({arithmetic}) = {micro} sequence(s) at once, but "
            f"training.micro_batch_size={own}: leave one of the three out"
        )
    return micro


def _ways_out(batch: int, steps: int, data_ranks: int) -> str:
    unit = steps * data_ranks
    below = batch // unit * unit
    ways = [f"training.batch_size={' or '.join(str(b) for b in (below, below + unit) if b)}"]
    if batch % data_ranks == 0:
        fit = choices(layout.divisors(batch // data_ranks))
        ways.append(f"training.gradient_accumulation_steps one of {fit}")
    return "use " + ", or ".join(ways)


def _kind(section: KeyValues) -> str:
    """What data is that does not say it: the sources of conversations name files."""
    sources = section.get("sources")
    named = [source for source in sources or () if isinstance(source, dict)]
    return "conversations" if any("train" in source for source in named) else "indexed"


def _data_file(name: str, folder: Path) -> Path:
    try:
        return find_file(name, kind="data", folder=folder)
    except ConfigError:
        return find_mixture(name)


def _run_of_weights(path: object) -> dict[str, Any]:
    """The config that weights were saved with."""
    file = _expand(path, "model.checkpoint_path") / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"model.checkpoint_path={str(path)!r}: {file} is not there, which says what was "
            "trained: name the output directory of a run, or one of its checkpoints"
        )
    return read_mapping(file)


def _expand(path: object, key: str) -> Path:
    try:
        return expand_path(str(path))
    except ValueError as error:
        raise ConfigError(f"{key}={error}") from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

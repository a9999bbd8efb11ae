"""A run's twin: small enough for a laptop, with everything that a layout could get wrong.

Kept: the kinds of layers and every pipeline cut, how heads and groups divide among ranks, the
routing, the dispatcher, tied embeddings, the optimizer and its options, the loss normalisation,
recomputation, and whether a micro-batch has several sequences. Shrunk: widths, depth, experts,
vocabulary, batch and sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibrium_mcore.certify.shrink import shrink_model
from equilibrium_mcore.certify.shrink_optimizer import shrink_optimizer
from equilibrium_mcore.config import rules
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.fused import fused_on_any_host
from equilibrium_mcore.config.layout import (
    DIMENSIONS,
    communication,
    data_parallel_size,
    micro_batch_unit,
    model_parallel_size,
    pipeline_segments,
)
from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.objectives import DistillationConfig
from equilibrium_mcore.config.online_rules import JUDGED
from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig

MAX_RANKS = 8
STEPS = 5
SEQUENCES = (
    8  # per global batch, or more: enough for two data ranks and four pipeline micro-batches
)
ENGINE_RECOMPUTES = "moe_act"  # only Transformer Engine's grouped experts can
BUCKET = 5000  # elements
# Names in a layout such as `tp=2,cp=2`, by setting; `data` is what is left and has none.
SHORT = {name: row.short for name, row in DIMENSIONS.items()} | {"sequence": "sp", "data": "dp"}


@dataclass(frozen=True)
class Layout:
    """A layout to certify: parallelism settings, and how many ranks it runs on."""

    name: str
    settings: dict[str, object]
    world_size: int


def parse_layout(text: str, *, base: ParallelismConfig) -> Layout:
    """A layout such as `tp=2,cp=2,ep=2`; names may be short or the config's own.

    `dp=N` sets the data-parallel size. Sequence parallelism follows tensor parallelism unless
    `sp=0` is given. Raises ConfigError for an unknown name or a value that is no positive number.
    """
    short = {short: name for name, short in SHORT.items()}
    values: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        key = short.get(name.strip(), name.strip())
        if key not in short.values() or not value.strip().isdecimal():
            raise ConfigError(
                f"layout {text!r}: {item!r} is not NAME=NUMBER with one of {', '.join(short)}, "
                "e.g. tp=2,cp=2,ep=2"
            )
        values[key] = int(value)
    data = values.pop("data", 1)
    sequence = bool(values.pop("sequence", values.get("tensor", 1) > 1))
    settings = {
        **values,
        "sequence": sequence,
        **_communication(base),
    }
    return Layout(text, settings, _world_size(values, data))


def shrink_layout(config: RunConfig, world_size: int | None = None) -> list[Layout]:
    """The config's own layout with every dimension above 1 at 2, on at most MAX_RANKS ranks.

    When all dimensions together need more, data parallelism is certified in a second layout.
    """
    p = config.parallelism
    small = {name: min(2, getattr(p, name)) for name in DIMENSIONS}
    small = {name: size for name, size in small.items() if size > 1}
    data = min(2, data_parallel_size(config, world_size))
    sequence = "sp=1" if p.sequence else "sp=0"

    def text(**sizes: int) -> str:
        parts = [f"{SHORT[name]}={size}" for name, size in sizes.items()]
        return ",".join([*parts, sequence] if sizes.get("tensor", 1) > 1 else parts)

    together = parse_layout(text(**small, data=data), base=p)
    if together.world_size <= MAX_RANKS:
        return [together] if together.world_size > 1 else []
    layouts = [parse_layout(text(**small), base=p)]
    rest = {k: v for k, v in small.items() if k in ("tensor", "expert", "expert_tensor")}
    layouts.append(parse_layout(text(**rest, data=data), base=p))
    return layouts


def _world_size(values: dict[str, int], data: int) -> int:
    dense = math.prod(values.get(n, 1) for n, row in DIMENSIONS.items() if row.splits_model)
    experts = math.prod(values.get(n, 1) for n, row in DIMENSIONS.items() if row.splits_experts)
    return math.lcm(dense * data, experts)


STAGE_OF_DATA = {
    "indexed": "pretrain",
    "conversations": "sft",
    "preferences": "orpo",
    "prompts": "pretrain",  # on made-up answers: `_as_documents`
}


def check_layout(config: RunConfig, layout: Layout) -> None:
    """Raise ConfigError for a layout that the run's own model does not allow, with the rule.

    Its batch is not asked: what a layout does to the numbers does not depend on it.
    """
    sections = {
        "model": config.model,
        "parallelism": _parallelism(layout),
    }
    problems = rules.check_sections(sections)
    if problems:
        raise ConfigError(problems, source=f"layout {layout.name} of {config.name}")


def make_twin(config: RunConfig, layouts: list[Layout], *, folder: Path) -> RunConfig:
    """The twin of `config` that fits every one of `layouts`, as a one-rank run in `folder`."""
    largest = {
        name: max([int(layout.settings.get(name, 1)) for layout in layouts], default=1)
        for name in DIMENSIONS
    }
    stages = math.lcm(*(pipeline_segments(_parallelism(layout)) for layout in layouts), 1)
    values = config.model_dump(mode="json")
    values["output_directory"] = str(folder)
    # One that takes the same data and needs no weights: the twin's are random.
    distills = isinstance(config.objective, DistillationConfig)
    values["stage"] = "distill" if distills else STAGE_OF_DATA[config.data.type]
    if distills:  # what it says is made up, too, of all tokens
        values["objective"].update(teacher="made_up", targets=None)
    values["model"] = shrink_model(
        config.model, stages=stages, largest=largest, run_tensor=config.parallelism.tensor
    )
    values["parallelism"] = {
        "world_size": 1,
        **_communication(config.parallelism),
    }
    if config.stage == JUDGED:
        values |= {**_as_pairs(values), "stage": STAGE_OF_DATA["preferences"]}
    elif config.data.type == "prompts":
        values |= _as_documents(values)
    values["data"].update(num_workers=0, document_multiple=2 * largest["context"])
    if values["data"]["type"] == "indexed":
        values["data"].update(train_samples=None)
    micro_batch = min(2, config.training.micro_batch_size)
    sequences = math.lcm(SEQUENCES, *(micro_batch * _at_once(layout) for layout in layouts))
    values["training"].update(
        # Each context rank takes two chunks, of which tensor ranks take equal parts.
        sequence_length=largest["context"] * math.lcm(64, 2 * largest["tensor"]),
        micro_batch_size=sequences if balances_globally(config) else micro_batch,
        global_batch_size=sequences,
        steps=STEPS,
        epochs=None,
        stop_after_steps=None,
        anomalies=None,  # every step is compared, sound or not
        left_out=[],
        compare_replicas=False,  # what a fault does to a replica is the certificate's to report
        frozen=[],  # names of the run's own layers, and what trains is compared
        precision="fp32",  # float64 inside, where the trace is sharp
        validation_interval_steps=0,
        backend="torch",
        fused=fused_on_any_host(config.training.fused),
        cuda_graphs=[],
        **_recomputed(config),
    )
    values["optimizer"] = shrink_optimizer(config, values["model"])
    values["checkpoint"] = {"resume": "never"}
    values["logging"] = {"tensorboard": False}
    return run_from_mapping(values)


def _as_documents(values: dict[str, Any]) -> dict[str, Any]:
    """A run on prompts as one on packed documents: answers, and what they earned, are made up.

    What it does with answers of its own is certified beside it: `rollouts.py`.
    """
    data = {
        "type": "indexed",
        "name": values["data"]["name"],
        "tokenizer": values["data"]["tokenizer"],
        "sources": [{"name": "made_up", "prefix": "made_up", "weight": 1.0}],
        "packing": "documents",
    }
    return {"data": data, "rewards": None, "rollout": {}, "evaluation": {}}


def _as_pairs(values: dict[str, Any]) -> dict[str, Any]:
    """A run on a judge's preferences as one on pairs that are made up; as `_as_documents`."""
    data = {
        "type": "preferences",
        "name": values["data"]["name"],
        "tokenizer": values["data"]["tokenizer"],
        "sources": [{"name": "made_up", "train": ["made_up.jsonl"]}],
    }
    return {"data": data, "judge": None, "rollout": {}, "evaluation": {}}


def _communication(p: ParallelismConfig) -> dict[str, object]:
    """The run's, with buckets of which a twin's gradients fill several."""
    values = communication(p)
    if p.overlap_grad_reduce:
        values["gradient_bucket_size"] = min(BUCKET, p.gradient_bucket_size or BUCKET)
    return values


def _parallelism(layout: Layout) -> ParallelismConfig:
    return ParallelismConfig(world_size=layout.world_size, **layout.settings)


def _at_once(layout: Layout) -> int:
    """Micro-batches that the layout's schedule takes at once, over its data ranks."""
    p = _parallelism(layout)
    return layout.world_size // model_parallel_size(p) * micro_batch_unit(p)


def balances_globally(config: RunConfig) -> bool:
    """Whether the balancing loss is one of the whole global batch, which has to be one forward."""
    moe = config.model.moe
    return moe is not None and moe.load_balancing == "global_aux_loss"


def _recomputed(config: RunConfig) -> dict[str, object]:
    """What the run recomputes, but for what Transformer Engine's experts alone can."""
    training = config.training
    if training.recompute != "selective":
        return {}
    modules = [name for name in training.recompute_modules if name != ENGINE_RECOMPUTES]
    return {"recompute_modules": modules} if modules else {"recompute": "none"}


def in_layout(twin: RunConfig, layout: Layout, **checkpoint: object) -> RunConfig:
    """The twin in another layout, with other checkpoint settings if given.

    Raises ConfigError, which names the layout, where the twin cannot be laid out so.
    """
    values = twin.model_dump(mode="json")
    kept = _communication(twin.parallelism)
    values["parallelism"] = {"world_size": layout.world_size, **kept, **layout.settings}
    values["checkpoint"].update(checkpoint)
    if balances_globally(twin):
        data = layout.world_size // model_parallel_size(ParallelismConfig(**values["parallelism"]))
        values["training"]["micro_batch_size"] = twin.training.global_batch_size // data
    try:
        return run_from_mapping(values)
    except ConfigError as error:
        raise ConfigError(error.problems, source=f"layout {layout.name} of the twin") from None

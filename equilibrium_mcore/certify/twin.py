"""A run's twin: small enough for a laptop, with everything that a layout could get wrong.

Kept: the kinds of layers and every pipeline cut, how heads and groups divide among ranks, the
routing, the dispatcher, tied embeddings, the optimizer and its options, the loss normalisation.
Shrunk: widths, depth, experts, vocabulary, batch and sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.layout import data_parallel_size
from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.pattern import CUT, balanced_cuts, cut_into, layers_of
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, RunConfig

MAX_RANKS = 8
STEPS = 5
SEQUENCES = 8  # per global batch: enough for two data ranks and four pipeline micro-batches
_DIMENSIONS = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")


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
    short = {
        "tp": "tensor",
        "cp": "context",
        "pp": "pipeline",
        "vpp": "virtual_pipeline",
        "ep": "expert",
        "etp": "expert_tensor",
        "sp": "sequence",
        "dp": "data",
    }
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
        "moe_dispatcher": base.moe_dispatcher,
        "distributed_optimizer": base.distributed_optimizer,
    }
    return Layout(text, settings, _world_size(values, data))


def shrink_layout(config: RunConfig, world_size: int | None = None) -> list[Layout]:
    """The config's own layout with every dimension above 1 at 2, on at most MAX_RANKS ranks.

    When all dimensions together need more, data parallelism is certified in a second layout.
    """
    p = config.parallelism
    small = {name: min(2, getattr(p, name)) for name in _DIMENSIONS}
    small = {name: size for name, size in small.items() if size > 1}
    data = min(2, data_parallel_size(config, world_size))
    sequence = "sp=1" if p.sequence else "sp=0"

    def text(**sizes: int) -> str:
        short = {"tensor": "tp", "context": "cp", "pipeline": "pp", "virtual_pipeline": "vpp"}
        short |= {"expert": "ep", "expert_tensor": "etp", "data": "dp"}
        parts = [f"{short[name]}={size}" for name, size in sizes.items()]
        return ",".join([*parts, sequence] if sizes.get("tensor", 1) > 1 else parts)

    together = parse_layout(text(**small, data=data), base=p)
    if together.world_size <= MAX_RANKS:
        return [together] if together.world_size > 1 else []
    layouts = [parse_layout(text(**small), base=p)]
    rest = {k: v for k, v in small.items() if k in ("tensor", "expert", "expert_tensor")}
    layouts.append(parse_layout(text(**rest, data=data), base=p))
    return layouts


def _world_size(values: dict[str, int], data: int) -> int:
    dense = math.prod(values.get(name, 1) for name in ("tensor", "context", "pipeline"))
    experts = math.prod(values.get(name, 1) for name in ("expert", "expert_tensor", "pipeline"))
    return math.lcm(dense * data, experts)


def make_twin(config: RunConfig, layouts: list[Layout], *, folder: Path) -> RunConfig:
    """The twin of `config` that fits every one of `layouts`, as a one-rank run in `folder`."""
    largest = {
        name: max([int(layout.settings.get(name, 1)) for layout in layouts], default=1)
        for name in _DIMENSIONS
    }
    stages = math.lcm(
        *(
            int(layout.settings.get("pipeline", 1))
            * int(layout.settings.get("virtual_pipeline", 1))
            for layout in layouts
        ),
        1,
    )
    values = config.model_dump(mode="json")
    values["output_directory"] = str(folder)
    values["model"] = shrink_model(config.model, stages=stages, largest=largest)
    values["parallelism"] = {
        "world_size": 1,
        "moe_dispatcher": config.parallelism.moe_dispatcher,
        "distributed_optimizer": config.parallelism.distributed_optimizer,
    }
    values["data"].update(
        train_samples=None, num_workers=0, document_multiple=2 * largest["context"]
    )
    values["training"].update(
        sequence_length=64 * largest["context"],
        micro_batch_size=1,
        global_batch_size=SEQUENCES,
        steps=STEPS,
        stop_after_steps=None,
        precision="fp32",
        recompute="none",
        validation_interval_steps=0,
        backend="torch",
    )
    values["optimizer"]["schedule"] = {"kind": "constant"}
    # Products in bfloat16 would hide a fault below their rounding.
    values["optimizer"]["muon"]["matmul_precision"] = "highest"
    values["optimizer"]["soap"]["basis_interval_steps"] = 2  # renewed within the few steps
    values["checkpoint"] = {"resume": "never"}
    values["logging"] = {"tensorboard": False}
    return run_from_mapping(values)


def in_layout(twin: RunConfig, layout: Layout, **checkpoint: object) -> RunConfig:
    """The twin in another layout, with other checkpoint settings if given."""
    values = twin.model_dump(mode="json")
    values["parallelism"] = {"world_size": layout.world_size, **layout.settings}
    values["checkpoint"].update(checkpoint)
    return run_from_mapping(values)


def shrink_model(model: ModelConfig, *, stages: int, largest: dict[str, int]) -> dict:
    """The model's section in small, divided by `largest` (sizes by dimension) as before."""
    values = model.model_dump(mode="json")
    tensor, context = largest["tensor"], largest["context"]
    ranks = tensor * context
    values.update(
        name=f"{model.name}_twin",
        layer_pattern=shrink_pattern(model.layer_pattern, stages),
        hidden_size=64,
        vocab_size=250,  # padded, so that rows beyond the vocabulary are there too
        vocab_size_multiple=64,
    )
    used = set(layers_of(model.layer_pattern))
    if "M" in used:
        mamba = model.mamba
        ratio = min(2, mamba.num_heads // mamba.num_groups)
        # Fewer groups than ranks are repeated over CP ranks: another path, kept where it is taken.
        # Two groups on a rank, where there are several: one alone cannot show a norm over both.
        several = 2 if mamba.num_groups >= 2 * ranks else 1
        groups = tensor if mamba.num_groups < ranks else several * ranks
        heads = math.lcm(groups * ratio, ranks)
        values["mamba"].update(
            num_heads=heads, head_dim=16, state_dim=16, num_groups=groups, chunk_size=16
        )
    if "*" in used:
        attention = model.attention
        ratio = min(2, attention.num_heads // attention.num_query_groups)
        groups = ranks if attention.num_query_groups >= ranks else tensor
        values["attention"].update(
            num_heads=math.lcm(groups * ratio, ranks), num_query_groups=groups, head_dim=16
        )
    if "+" in used:
        values["mla"].update(
            num_heads=max(2, ranks),
            q_lora_rank=None if model.mla.q_lora_rank is None else 32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16 if model.mla.v_head_dim == model.mla.qk_nope_head_dim else 24,
        )
    if "-" in used:
        values["mlp"].update(ffn_hidden_size=96)
    if "E" in used:
        moe = model.moe
        experts = max(2 * largest["expert"], min(moe.num_experts, 8))
        values["moe"].update(
            num_experts=experts,
            top_k=min(moe.top_k, experts // 2),
            expert_ffn_hidden_size=32,
            shared_ffn_hidden_size=64 if moe.shared_ffn_hidden_size else 0,
        )
    return values


def shrink_pattern(pattern: str, stages: int) -> str:
    """`stages` segments that each keep one layer of every kind which their stage has, in order."""
    try:
        cut = cut_into(pattern, stages)
    except ValueError:
        cut = balanced_cuts(pattern, stages)
    segments = ["".join(dict.fromkeys(segment)) for segment in cut.split(CUT)]
    if len(segments) != stages:
        raise ConfigError(
            f"model.layer_pattern={pattern!r} cannot be cut into {stages} stages: it has "
            f"{len(layers_of(pattern))} layers"
        )
    return CUT.join(segments)

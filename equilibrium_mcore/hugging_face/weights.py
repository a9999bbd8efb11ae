"""Writes an exported model's weights: safetensors files of bounded size, and their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.hugging_face.mapping import ParamMapping
from equilibrium_mcore.hugging_face.source import TensorSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WeightsReport:
    """What was written. `active_parameters` work on one token (top_k of the routed experts)."""

    dtype: str
    parameters: int
    active_parameters: int
    bytes: int
    files: int


def write_weights(
    folder: Path,
    *,
    source: TensorSource,
    rows: list[ParamMapping],
    model: ModelConfig,
    hugging_face_config: dict[str, Any],
    dtype: str,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> WeightsReport:
    """Convert and write all tensors of `rows` into `folder`, one file in memory at a time.

    Every tensor is checked against the shape that the Hugging Face model of these config values
    has; raises ValueError where they differ.
    """
    shapes = expected_shapes(hugging_face_config)
    made = {name for row in rows for name in row.hugging_face}
    if made != shapes.keys():
        raise ValueError(
            "the mapping table and the Hugging Face model differ in: "
            + ", ".join(sorted(made ^ shapes.keys()))
        )
    sizes = {
        name: shapes[name].numel() * _target(row, dtype).itemsize
        for row in rows
        for name in row.hugging_face
    }
    tensors = _converted(source, rows, model, dtype, shapes)
    files = _write_shards(_counted(tensors, len(sizes), progress), sizes, folder, max_shard_bytes)
    total, active = _count_parameters(model, shapes)
    return WeightsReport(dtype, total, active, sum(sizes.values()), files)


def to_hugging_face(
    read: Callable[[str], Tensor], rows: list[ParamMapping], model: ModelConfig
) -> Iterator[tuple[ParamMapping, str, Tensor]]:
    """Every Hugging Face tensor of `rows` with its row and name, one row after the other.

    `read` gives a whole tensor by its Megatron name: of a checkpoint, or of a model in memory.
    """
    for row in rows:
        found = [read(name) for name in row.megatron]
        converted = row.transform.to_hugging_face(found, model)
        for name, tensor in zip(row.hugging_face, converted, strict=True):
            yield row, name, tensor


def expected_shapes(hugging_face_config: dict[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the tensors that the Hugging Face model of these config values loads."""
    from equilibrium_mcore.hugging_face.model_code import modeling_equilibrium
    from equilibrium_mcore.hugging_face.model_code.configuration_equilibrium import (
        EquilibriumConfig,
    )

    (name,) = hugging_face_config.get("architectures", ["EquilibriumForCausalLM"])
    with torch.device("meta"):
        model = getattr(modeling_equilibrium, name)(EquilibriumConfig(**hugging_face_config))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if hugging_face_config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight", None)
    return shapes


# --------------------------------------------------------------------------------- the inside


def _target(row: ParamMapping, dtype: str) -> torch.dtype:
    return torch.float32 if row.keep_float32 else DTYPES[dtype]


def _converted(
    source: TensorSource,
    rows: list[ParamMapping],
    model: ModelConfig,
    dtype: str,
    shapes: dict[str, torch.Size],
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors one after the other."""
    for row, name, tensor in to_hugging_face(source.read, rows, model):
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{', '.join(row.megatron)} gives {name} of shape {tuple(tensor.shape)}, and "
                f"the model's config asks for {tuple(shapes[name])}: the config saved with the "
                f"checkpoint is not the one that trained it"
            )
        # A clone, because safetensors refuses tensors that share memory.
        yield name, tensor.to(_target(row, dtype)).clone(memory_format=torch.contiguous_format)


def _counted(
    tensors: Iterator[tuple[str, Tensor]], total: int, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    for done, item in enumerate(tensors, start=1):
        yield item
        if progress:
            progress(done, total)


def _write_shards(
    tensors: Iterator[tuple[str, Tensor]],
    sizes: dict[str, int],
    folder: Path,
    max_shard_bytes: int,
) -> int:
    """Write the tensors, which come in the order of `sizes`; returns the number of files."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        held = dict(next(tensors) for _ in names)
        assert list(held) == names
        with naming(folder / file):
            save_file(held, folder / file, metadata={"format": "pt"})
        del held
    next(tensors, None)  # lets the last one be counted
    if count > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        path = folder / "model.safetensors.index.json"
        write_whole(path, json.dumps(index, indent=2) + "\n")
    return count


def _count_parameters(model: ModelConfig, shapes: dict[str, torch.Size]) -> tuple[int, int]:
    """All parameters, and those that work on one token. Expert biases are not parameters."""
    total = sum(s.numel() for name, s in shapes.items() if "correction_bias" not in name)
    if model.moe is None:
        return total, total
    routed = sum(s.numel() for name, s in shapes.items() if ".mixer.experts." in name)
    return total, total - routed + routed * model.moe.top_k // model.moe.num_experts

"""Adapters by themselves, in the layout that the peft library loads on the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from equilibrium_mcore.adapters.names import WEIGHT
from equilibrium_mcore.config.adapters import LoraConfig
from equilibrium_mcore.config.heads import has_scalar_head
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.hugging_face.mapping import ParamMapping, expand
from equilibrium_mcore.hugging_face.merged import WithoutAdapters, rows_of
from equilibrium_mcore.hugging_face.weights import DTYPES
from equilibrium_mcore.models.heads import SCALAR_HEAD_WEIGHT

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what peft wraps around a model's names


def write_adapters(
    folder: Path,
    *,
    source: WithoutAdapters,
    settings: LoraConfig,
    model: ModelConfig,
    dtype: str,
    base: str,
) -> int:
    """Write peft's two files into `folder`; the number of adapters in them.

    A fused layer's adapter becomes one for each of Hugging Face's layers that it is made of: the
    same A, and the rows of B that are that layer's.

    Args:
        base: name or path of the exported model that they belong to.

    Raises ValueError for adapters of routed experts, whose weights are no layers there.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    layers: list[str] = []
    for row in expand(model):
        factors = _factors_of(row, source, model)
        if factors is None:
            continue
        a, parts = factors
        for name, b in zip(
            row.hugging_face, row.transform.to_hugging_face(parts, model), strict=True
        ):
            layer = name.removesuffix(WEIGHT)
            layers.append(layer)
            for factor, tensor in (("lora_A", a), ("lora_B", b)):
                kept = tensor.to(DTYPES[dtype]).clone(memory_format=torch.contiguous_format)
                tensors[f"{_PREFIX}{layer}.{factor}{WEIGHT}"] = kept
    scores = has_scalar_head(model)
    if scores:  # trained whole beside the adapters
        head = source.read(SCALAR_HEAD_WEIGHT).to(DTYPES[dtype])
        tensors[f"{_PREFIX}score{WEIGHT}"] = head.clone(memory_format=torch.contiguous_format)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "modules_to_save": ["score"] if scores else None,
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "target_modules": sorted(layers),
    }
    write_whole(folder / CONFIG_FILE, json.dumps(values, indent=2) + "\n")
    return len(layers)


def _factors_of(
    row: ParamMapping, source: WithoutAdapters, model: ModelConfig
) -> tuple[Tensor, list[Tensor]] | None:
    """A, and B cut as the row's weights are; None where they have no adapter."""
    names = [name.rpartition(WEIGHT) for name in row.megatron]
    layer = names[0][0]
    factors = source.factors(layer) if names[0][1] else None
    if factors is None:
        return None
    a, b = factors
    if a.dim() > 2:
        raise ValueError(
            f"{layer} has adapters of routed experts, and Hugging Face stacks those weights, "
            "beside which peft puts none: export with --adapters merge"
        )
    return a, [rows_of(b, layer, part, model) for _, _, part in names]

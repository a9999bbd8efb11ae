"""Turns a distributed checkpoint into a folder that Hugging Face transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.schema import RunConfig, TokenizerConfig
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from equilibrium_mcore.export.config_json import AUTO_MAP, config_values
from equilibrium_mcore.export.mapping import ParamMapping, plan
from equilibrium_mcore.export.model_card import model_card
from equilibrium_mcore.export.reader import CheckpointReader
from equilibrium_mcore.export.tokenizer_files import write_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONFIG_NAME = "config.yaml"
MODELLING_CODE = Path(__file__).parent / "hugging_face"
MODELLING_FILES = ("configuration_equilibrium.py", "modeling_equilibrium.py")
DEFAULT_SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What was written: where, of which checkpoint, how much."""

    directory: Path
    checkpoint: Path
    parameters: int
    bytes: int
    shards: int


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder at `path`, or the latest of the run whose output directory it is."""
    if (path / ".metadata").is_file():
        return path
    from equilibrium_mcore.checkpoint.directory import latest_checkpoint

    return latest_checkpoint(path)


def export_hugging_face(
    checkpoint: Path,
    output_directory: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    tokenizer: TokenizerConfig | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the model of `checkpoint` to `output_directory`; memory is that of one shard.

    Args:
        checkpoint: a checkpoint folder, or a run's output directory (its latest is taken).
        dtype: of the weights; `A_log`, `D`, `dt_bias` and expert biases stay float32.
        tokenizer: instead of the one that the run's config names.
        max_shard_bytes: a .safetensors file holds at most this much, or one tensor.
        overwrite: replace the folder if it exists.
        progress: called with (tensors written, tensors in all).

    Everything is written beside the folder and renamed at the end. Raises FileNotFoundError for
    what is not there, FileExistsError, and ValueError where checkpoint and config do not fit.
    """
    checkpoint = find_checkpoint(checkpoint)
    if output_directory.exists() and not overwrite:
        raise FileExistsError(
            f"{output_directory} exists: choose another output folder, or overwrite it "
            f"(--overwrite)"
        )
    config = read_run_config(checkpoint)
    reader = CheckpointReader(checkpoint)
    rows = plan(config.model, reader.names())
    source = load_tokenizer(tokenizer or config.data.tokenizer)
    if source.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {source.path} has {source.vocab_size} tokens and the model "
            f"vocab_size={config.model.vocab_size}: it is not the tokenizer of the training data"
        )

    aside = output_directory.with_name(output_directory.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        report = _write(
            aside, checkpoint, config, rows, reader, source, dtype, max_shard_bytes, progress
        )
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _put_in_place(aside, output_directory)
    return replace(report, directory=output_directory)


def _write(
    folder: Path,
    checkpoint: Path,
    config: RunConfig,
    rows: list[ParamMapping],
    reader: CheckpointReader,
    tokenizer: Tokenizer,
    dtype: str,
    max_shard_bytes: int,
    progress: Progress | None,
) -> ExportReport:
    """Everything that goes into `folder`."""
    values = _config_json(config, tokenizer, dtype)
    for name in MODELLING_FILES:
        shutil.copyfile(MODELLING_CODE / name, folder / name)
    _write_json(folder / "config.json", values)
    _write_json(folder / "generation_config.json", _generation_json(values))
    write_tokenizer(tokenizer, folder)
    shapes = expected_shapes(values)
    _check_names(rows, shapes)
    tensors = _converted(reader, rows, config, DTYPES[dtype], shapes, progress)
    sizes = {
        name: shapes[name].numel() * (4 if row.keep_float32 else DTYPES[dtype].itemsize)
        for row in rows
        for name in row.hugging_face
    }
    shards = write_shards(tensors, sizes, folder, max_shard_bytes)
    total, active = count_parameters(config, rows, shapes)
    card = model_card(
        config,
        checkpoint=checkpoint,
        dtype=dtype,
        total_parameters=total,
        active_parameters=active,
        splits_special_tokens=_splits_special_tokens(folder),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return ExportReport(folder, checkpoint, total, sum(sizes.values()), shards)


def read_run_config(checkpoint: Path) -> RunConfig:
    """The effective config that was saved with the checkpoint."""
    path = checkpoint / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the checkpoint's run config is needed")
    return load_run(path)


def expected_shapes(values: dict[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the tensors that the Hugging Face model of these config values loads."""
    from equilibrium_mcore.export.hugging_face.configuration_equilibrium import EquilibriumConfig
    from equilibrium_mcore.export.hugging_face.modeling_equilibrium import EquilibriumForCausalLM

    with torch.device("meta"):
        model = EquilibriumForCausalLM(EquilibriumConfig(**values))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if values["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes


def count_parameters(
    config: RunConfig, rows: list[ParamMapping], shapes: dict[str, torch.Size]
) -> tuple[int, int]:
    """All parameters, and those that work on one token (top_k of the routed experts)."""
    counted = [name for row in rows for name in row.hugging_face if "correction_bias" not in name]
    total = sum(shapes[name].numel() for name in counted)
    moe = config.model.moe
    if moe is None:
        return total, total
    routed = sum(shapes[name].numel() for name in counted if ".mixer.experts." in name)
    return total, total - routed + routed * moe.top_k // moe.num_experts


def write_shards(
    tensors: Iterator[tuple[str, Tensor]],
    sizes: dict[str, int],
    folder: Path,
    max_shard_bytes: int,
) -> int:
    """Write the tensors, in the order of `sizes`, to .safetensors files and their index.

    Returns the number of files.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        held = dict(next(tensors) for _ in names)
        save_file(held, folder / file, metadata={"format": "pt"})
        del held
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
    return len(shards)


# --------------------------------------------------------------------------------- the inside


def _check_names(rows: list[ParamMapping], shapes: dict[str, torch.Size]) -> None:
    made = {name for row in rows for name in row.hugging_face}
    differing = sorted(made ^ shapes.keys())
    if differing:
        raise ValueError(
            f"the mapping table and the Hugging Face model differ in: {', '.join(differing)}"
        )


def _converted(
    reader: CheckpointReader,
    rows: list[ParamMapping],
    config: RunConfig,
    dtype: torch.dtype,
    shapes: dict[str, torch.Size],
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors one after the other, each checked against the model's shape."""
    done = 0
    for row in rows:
        found = [reader.read(name) for name in row.megatron]
        target = torch.float32 if row.keep_float32 else dtype
        converted = row.transform.to_hugging_face(found, config.model)
        for name, tensor in zip(row.hugging_face, converted, strict=True):
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"{', '.join(row.megatron)} gives {name} of shape {tuple(tensor.shape)}, and "
                    f"the model's config asks for {tuple(shapes[name])}: the checkpoint's "
                    f"{CONFIG_NAME} is not the config that trained it"
                )
            # A clone, because safetensors refuses tensors that share memory.
            yield name, tensor.to(target).clone(memory_format=torch.contiguous_format)
            done += 1
            if progress:
                progress(done, len(shapes))


def _config_json(config: RunConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    from transformers import __version__

    return {
        "model_type": "equilibrium",
        "architectures": ["EquilibriumForCausalLM"],
        "auto_map": AUTO_MAP,
        **config_values(config.model, sequence_length=config.training.sequence_length),
        # In the training stream every document stands behind an end of document.
        "bos_token_id": tokenizer.eod if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod if tokenizer.pad_id is None else tokenizer.pad_id,
        "dtype": dtype,
        "transformers_version": __version__,
    }


def _generation_json(values: dict[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    return {key: values[key] for key in keys}


def _splits_special_tokens(folder: Path) -> bool:
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return bool(settings.get("split_special_tokens", False))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; a folder that was there goes only once the new one is whole."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(aside, target)
    shutil.rmtree(old, ignore_errors=True)

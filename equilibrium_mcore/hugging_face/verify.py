"""Proof that an exported folder computes what its checkpoint computes: logits side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.config.heads import has_output
from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.hugging_face.convert import find_checkpoint, read_run_config
from equilibrium_mcore.hugging_face.reader import CheckpointReader
from equilibrium_mcore.hugging_face.weights import DTYPES

TOLERANCE = 1e-4  # float32, max abs difference of logits
TEXT = "def add(a, b):\n    return a + b\n\nA list is an ordered collection of values. "
MAX_TOKENS = 256


def verify_export(
    checkpoint: Path, folder: Path, *, text: str = TEXT, main_weights: bool = False
) -> float:
    """The largest absolute difference of logits, both models in float32, on `text`.

    `main_weights`: the folder was made of the optimizer's float32 copies, so Megatron computes with
    them too. Megatron's weights are rounded to the folder's dtype first, so that only the
    computation is compared. Needs memory for one model at a time, and a process without process
    groups. Raises ValueError when the difference is above TOLERANCE.
    """
    checkpoint = find_checkpoint(checkpoint)
    config = read_run_config(checkpoint)
    length = min(config.training.sequence_length, MAX_TOKENS)
    ids = torch.tensor([(load_tokenizer(config.data.tokenizer).encode(text) * length)[:length]])
    dtype = DTYPES[json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]]
    found = hugging_face_logits(folder, ids)
    expected = megatron_logits(checkpoint, config, ids, rounded_to=dtype, main_weights=main_weights)
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE:  # also catches NaN
        raise ValueError(
            f"{folder} computes other logits than {checkpoint}: they differ by up to "
            f"{difference:.2e}, and {TOLERANCE:g} is allowed"
        )
    return difference


def hugging_face_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits (batch, tokens, vocabulary) of the exported model, in float32.

    ids: (batch, tokens). Of a reward model scores of every token instead, (batch, tokens).
    """
    import transformers

    auto = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    (kind,) = [name for name in auto if name.startswith("AutoModelFor")]
    model = getattr(transformers, kind).from_pretrained(
        str(folder), trust_remote_code=True, local_files_only=True, dtype=torch.float32
    )
    with torch.no_grad():
        if kind == "AutoModelForSequenceClassification":
            return model.eval().token_scores(ids)
        return model.eval()(ids).logits


def megatron_logits(
    checkpoint: Path,
    config: RunConfig,
    ids: Tensor,
    *,
    rounded_to: torch.dtype = torch.float32,
    main_weights: bool = False,
) -> Tensor:
    """The same of megatron-core's model, on this process alone, for the real vocabulary."""
    from equilibrium_mcore.parallel import accelerator

    accelerator.install()  # before megatron-core is imported
    from megatron.core import dist_checkpointing

    from equilibrium_mcore.adapters.merge import adapters_of_weights
    from equilibrium_mcore.checkpoint.safe_load import allowed_classes_only
    from equilibrium_mcore.models.provider import build_model, is_kept_in_float32
    from equilibrium_mcore.parallel.process_groups import one_rank

    training = config.training.model_copy(
        update={"precision": "fp32", "recompute": "none", "backend": "torch"}
    )
    with one_rank(seed=0) as groups:
        model = build_model(config.model, ParallelismConfig(), training, groups).eval()
        with adapters_of_weights([model], config, groups=groups):
            wanted = {"model": model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})}
            _take_keys(wanted, CheckpointReader(checkpoint, main_weights=main_weights))
            with allowed_classes_only():
                loaded = dist_checkpointing.load(wanted, str(checkpoint))
            model.load_state_dict(loaded["model"])
        for name, parameter in model.named_parameters():
            if not is_kept_in_float32(name):
                parameter.data = parameter.data.to(rounded_to).float()
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        with torch.no_grad():
            logits = model.to(accelerator.device())(
                ids.to(accelerator.device()), positions.to(accelerator.device()), None
            )
    if has_output(config.model):
        logits = logits[..., : config.model.vocab_size]
    return logits.float().cpu()


def _take_keys(wanted: dict[str, Any], reader: CheckpointReader) -> None:
    """Let every tensor of a sharded state be loaded from where `reader` reads it."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def renamed(leaf: Any) -> Any:
        if isinstance(leaf, ShardedTensor):
            leaf.key = reader.key_of(leaf.key)
        elif isinstance(leaf, ShardedTensorFactory):  # of several tensors, each with its own name
            build = leaf.build_fn
            leaf.build_fn = lambda *given: dict_list_map_inplace(renamed, build(*given))
        return leaf

    dict_list_map_inplace(renamed, wanted)

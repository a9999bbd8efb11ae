"""A tiny run: its config, its data, and functions that ranks execute."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo

VOCABULARY = 512

MODEL: dict[str, Any] = {
    "name": "test_hybrid",
    "layer_pattern": "ME|M-|+E|ME",
    "hidden_size": 64,
    "vocab_size": VOCABULARY,
    "vocab_size_multiple": 64,
    "mamba": {"num_heads": 8, "head_dim": 16, "state_dim": 16, "num_groups": 4, "chunk_size": 16},
    "mla": {
        "num_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "mlp": {"ffn_hidden_size": 96},
    "moe": {
        "num_experts": 8,
        "top_k": 2,
        "expert_ffn_hidden_size": 32,
        "shared_ffn_hidden_size": 64,
        "load_balancing": "seq_aux_loss",
        "aux_loss_coefficient": 0.01,
    },
}


def make_data(folder: Path) -> dict[str, Any]:
    """Two small sources of made-up text with a tokenizer, as the `data` section of a run."""
    from equilibrium_mcore.config.data import TokenizerConfig
    from equilibrium_mcore.corpus.preprocess import preprocess
    from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(400)]
    weights = range(400, 0, -1)
    names = ("first", "second")
    for name in names:
        texts = [" ".join(rng.choices(words, weights, k=rng.randint(40, 160))) for _ in range(120)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    model = folder / "tokenizer.model"
    inputs = [folder / f"{name}.jsonl" for name in names]
    train_tokenizer(inputs=inputs, output=model, vocab_size=VOCABULARY)
    tokenizer = {"type": "SentencePieceTokenizer", "model": str(model)}
    for path in inputs:
        preprocess(
            inputs=[path],
            output_prefix=path.with_suffix(""),
            tokenizer=TokenizerConfig(type=tokenizer["type"], model=model),
            append_eod=True,
        )
    sources = [
        {"name": name, "prefix": str(folder / f"{name}_text_document"), "weight": weight}
        for name, weight in zip(names, (0.7, 0.3), strict=True)
    ]
    return {"name": "test", "tokenizer": tokenizer, "sources": sources, "split": "90,8,2"}


def tiny_run(data: dict[str, Any], output: Path, **changes: Any) -> RunConfig:
    """The tiny run; `changes` are whole or partial sections, e.g. parallelism={"tensor": 2}."""
    values: dict[str, Any] = {
        "name": "test",
        "output_directory": str(output),
        "model": MODEL,
        "data": data,
        "parallelism": {},
        "training": {
            "sequence_length": 64,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "steps": 20,
            "precision": "fp32",
        },
        "optimizer": {
            "muon": {"learning_rate": 2e-3, "extra_scale": 0.2},
            "adamw": {"learning_rate": 2e-3},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        },
        "checkpoint": {},
        "logging": {"tensorboard": False},
    }
    for section, change in changes.items():
        if isinstance(change, dict):
            values[section] = {**values.get(section, {}), **change}
        else:
            values[section] = change
    return run_from_mapping(values)


def train_steps(
    rank_info: RankInfo, config: RunConfig, steps: int, save: bool = False
) -> dict[str, Any]:
    """Set up, resume if there is something, train `steps` steps; what was seen."""
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    start = run.progress.step
    squares = _note_gradients(run)
    outcomes = [train_step(run) for _ in range(steps)]
    if save:
        CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    teardown(run)
    return {
        "start": start,
        "loss": [outcome.loss for outcome in outcomes],
        "norm": [outcome.gradient_norm for outcome in outcomes],
        "aux": [outcome.aux_loss for outcome in outcomes],
        "gradient_squares": squares,
    }


def _note_gradients(run: Any) -> dict[str, float]:
    """Filled in the first step: the sum of squares of every gradient of which this rank's copy
    counts. Added up over ranks it does not depend on the layout."""
    squares: dict[str, float] = {}
    update = run.optimizer.step

    def noted() -> Any:
        if not squares:
            for parameter in run.optimizer.parameters:
                if parameter.counts_in_norm and parameter.is_owned:
                    square = parameter.gradient.double().square().sum().item()
                    squares[parameter.name] = squares.get(parameter.name, 0.0) + square
        return update()

    run.optimizer.step = noted
    return squares

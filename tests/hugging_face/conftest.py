"""Checkpoints of small models with every weight random, so that no fault hides behind a zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from equilibrium_mcore.config.data import DataConfig, SourceConfig, TokenizerConfig
from equilibrium_mcore.config.load import save_config
from equilibrium_mcore.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    LoggingConfig,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelismConfig,
    RunConfig,
    TrainingConfig,
)
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.parallel import accelerator

accelerator.install()

VOCABULARY = 600  # padded to 640
MAMBA = MambaConfig(num_heads=4, head_dim=16, state_dim=8, num_groups=2, chunk_size=8)
ATTENTION = {"num_heads": 4, "num_query_groups": 2, "head_dim": 16}
MLA = {
    "num_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MOE = {"num_experts": 8, "top_k": 2, "expert_ffn_hidden_size": 24, "load_balancing": "none"}

# A large epsilon, so that a norm with another one shows.
EPSILON = 5e-2


def _model(name: str, pattern: str, **settings) -> ModelConfig:
    return ModelConfig(
        name=name,
        layer_pattern=pattern,
        hidden_size=48,
        vocab_size=VOCABULARY,
        norm_epsilon=EPSILON,
        **settings,
    )


MODELS = {
    model.name: model
    for model in (
        _model(
            "hybrid",
            "ME|+E",
            mamba=MAMBA,
            mla=MLAConfig(q_lora_rank=24, **MLA),
            moe=MoEConfig(shared_ffn_hidden_size=40, routed_scaling_factor=1.5, **MOE),
        ),
        _model(
            "llama",
            "*-*-",
            attention=AttentionConfig(**ATTENTION),
            mlp=MLPConfig(ffn_hidden_size=64),
            tie_embeddings=True,
        ),
        _model(
            "qwen",
            "*-*-",
            attention=AttentionConfig(qkv_bias=True, rope_base=1000000.0, **ATTENTION),
            mlp=MLPConfig(ffn_hidden_size=64),
        ),
        _model(
            "deepseek",
            "+-+E",
            mla=MLAConfig(q_lora_rank=None, **MLA),
            mlp=MLPConfig(ffn_hidden_size=64),
            moe=MoEConfig(
                shared_ffn_hidden_size=40,
                score_function="sigmoid",
                expert_bias=True,
                routed_scaling_factor=2.5,
                **MOE,
            ),
        ),
        _model(
            "nemotron",
            "M*E-",
            mamba=MAMBA,
            attention=AttentionConfig(rope_base=None, **ATTENTION),
            mlp=MLPConfig(ffn_hidden_size=64, activation="relu2"),
            moe=MoEConfig(activation="relu2", normalize_top_k=False, **MOE),
        ),
        _model("mamba2", "MM", mamba=MAMBA, tie_embeddings=True),
        _model(
            "gelu",
            "*-",
            attention=AttentionConfig(**ATTENTION),
            mlp=MLPConfig(ffn_hidden_size=64, activation="gelu"),
        ),
    )
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint, the config of its run, and Megatron's logits for `ids`."""

    directory: Path
    config: RunConfig
    ids: Tensor
    logits: Tensor


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of VOCABULARY tokens, trained on the standard library."""
    import inspect
    import json
    import textwrap

    from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [inspect.getsource(module) for module in (argparse_module(), inspect, textwrap, json)]
    lines = "".join(json.dumps({"text": part}) + "\n" for text in texts for part in _parts(text))
    (folder / "text.jsonl").write_text(lines)
    output = folder / "tokenizer.model"
    train_tokenizer(inputs=[folder / "text.jsonl"], output=output, vocab_size=VOCABULARY)
    return output


def argparse_module():
    """A long module of code and prose."""
    import argparse

    return argparse


def _parts(text: str, size: int = 4000) -> Iterator[str]:
    for start in range(0, len(text), size):
        yield text[start : start + size]


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path
) -> Callable[[str], Saved]:
    """Makes the checkpoint of a model of MODELS, once."""
    made: dict[str, Saved] = {}

    def make(name: str) -> Saved:
        if name not in made:
            directory = tmp_path_factory.mktemp(name) / "step_00000020"
            made[name] = _save(MODELS[name], directory, sentencepiece_model)
        return made[name]

    return make


def _save(model_config: ModelConfig, directory: Path, tokenizer: Path) -> Saved:
    from megatron.core import dist_checkpointing

    from equilibrium_mcore.models.provider import build_model
    from equilibrium_mcore.parallel.process_groups import one_rank

    config = _run_config(model_config, directory, tokenizer)
    text = "def f(x):\n    return x\nHowever, the default is None. "
    ids = load_tokenizer(config.data.tokenizer).encode(text * 2)[:48]
    batch = torch.tensor([ids, ids[::-1]])
    with one_rank(seed=7) as groups:
        model = build_model(model_config, config.parallelism, config.training, groups).eval()
        _randomize(model)
        positions = torch.arange(batch.shape[1]).expand_as(batch)
        with torch.no_grad():
            logits = model(batch, positions, None)[..., :VOCABULARY]
        directory.mkdir(parents=True)
        state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        dist_checkpointing.save(state, str(directory))
    save_config(config, directory / "config.yaml")
    return Saved(directory, config, batch, logits)


def _randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("expert_bias"):
                tensor.normal_(std=0.5)
            elif (
                name.endswith(("A_log", "D", "dt_bias"))
                or tensor.dim() == 1
                and tensor.requires_grad
            ):
                tensor.add_(torch.randn_like(tensor) * 0.3)
            elif tensor.requires_grad and "conv1d" not in name:
                tensor.normal_(std=0.15)


def _run_config(model: ModelConfig, directory: Path, tokenizer: Path) -> RunConfig:
    return RunConfig(
        name=f"test-{model.name}",
        output_directory=directory.parent,
        model=model,
        data=DataConfig(
            name="none",
            tokenizer=TokenizerConfig(type="SentencePieceTokenizer", model=tokenizer),
            sources=[
                SourceConfig(name="code", prefix=directory / "code", weight=3.0),
                SourceConfig(name="prose", prefix=directory / "prose", weight=1.0),
            ],
        ),
        parallelism=ParallelismConfig(),
        optimizer=OptimizerConfig(),
        training=TrainingConfig(
            sequence_length=64, global_batch_size=8, steps=40, precision="fp32", backend="torch"
        ),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
    )


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, saved: Callable[[str], Saved]
) -> Callable[[str], Path]:
    """Exports a model of MODELS in float32, once."""
    from equilibrium_mcore.hugging_face.convert import export_hugging_face

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("exported") / name
            export_hugging_face(saved(name).directory, folder, dtype="float32")
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def fine_tuned(ranks, data, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of supervised fine-tuning that has ended; its output directory has a checkpoint."""
    from tests.hugging_face.chat_run import chat_run, fine_tune

    config = chat_run(data, tmp_path_factory.mktemp("fine_tuned"))
    assert ranks.run(1, fine_tune, config)[0] < 0.3
    return config

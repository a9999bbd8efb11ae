"""One rank in this process, and small models in float64 or float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from equilibrium_mcore.config.schema import (
    AttentionConfig,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    ParallelismConfig,
    TrainingConfig,
)
from equilibrium_mcore.parallel import accelerator

accelerator.install()  # before megatron-core is imported
accelerator.quiet_libraries()

SECTIONS = {
    "M": {"mamba": MambaConfig(num_heads=6, head_dim=8, state_dim=5, num_groups=2, chunk_size=4)},
    "*": {"attention": AttentionConfig(num_heads=4, num_query_groups=2, head_dim=8)},
    "+": {
        "mla": MLAConfig(
            num_heads=4,
            q_lora_rank=12,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
        )
    },
    "-": {"mlp": MLPConfig(ffn_hidden_size=40)},
    "E": {
        "moe": MoEConfig(
            num_experts=6,
            top_k=2,
            expert_ffn_hidden_size=12,
            shared_ffn_hidden_size=20,
            load_balancing="none",
        )
    },
}


@pytest.fixture(scope="module")
def single_rank() -> Iterator[Any]:
    """megatron-core's groups over this process alone.

    Per module, not per session: tests of other rooms in this process want groups of their own.
    """
    from equilibrium_mcore.parallel.process_groups import one_rank

    with one_rank(seed=0) as groups:
        yield groups


@pytest.fixture(scope="session")
def small_model() -> Callable[..., ModelConfig]:
    """`small_model("M-", norm_epsilon=1e-3)`: a config with the sections that its pattern needs."""

    def make(pattern: str, **changes: Any) -> ModelConfig:
        values: dict[str, Any] = {}
        for letter in pattern.replace("|", ""):
            values |= SECTIONS[letter]
        base = dict(name="small", layer_pattern=pattern, hidden_size=24, vocab_size=50)
        return ModelConfig(**base | {"vocab_size_multiple": 8} | values | changes)

    return make


@pytest.fixture
def build(single_rank: Any) -> Callable[..., Any]:
    """`build(model)`: the real model on one rank, float64 or `dtype`, every parameter random."""
    from equilibrium_mcore.models.provider import build_model
    from equilibrium_mcore.models.transformer_config import build_transformer_config

    def make(model: ModelConfig, *, dtype: torch.dtype = torch.float64, **training: Any) -> Any:
        values = dict(sequence_length=64, global_batch_size=1, steps=1, precision="fp32")
        numerics = TrainingConfig(**values | {"backend": "torch"} | training)
        layout, on_gpu = ParallelismConfig(), accelerator.has_cuda()
        config = build_transformer_config(model, layout, numerics, on_gpu=on_gpu)
        config.params_dtype = dtype
        module = build_model(
            model, layout, numerics, single_rank, on_gpu=on_gpu, transformer_config=config
        ).to(accelerator.device())
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            # Nothing may hide behind a bias of zero, a norm of one or a weight that hardly acts.
            parameter.data.add_((0.3 * noise).to(parameter))
        return module.eval()

    return make


@pytest.fixture
def logits_of() -> Callable[..., torch.Tensor]:
    """`logits_of(module, ids)`: (batch, tokens, vocabulary) for ids (batch, tokens), on the CPU."""

    def compute(module: Any, ids: torch.Tensor, packed: Any = None) -> torch.Tensor:
        ids = ids.to(accelerator.device())
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with torch.no_grad():
            logits = module(ids, positions, None, packed_seq_params=packed)
        return logits.cpu()

    return compute


@pytest.fixture(scope="session")
def packing() -> Callable[..., Any]:
    """`packing([3, 5])`: PackedSeqParams of documents with these lengths."""
    from megatron.core.packed_seq_params import PackedSeqParams

    def make(lengths: list[int], *, with_documents: bool = True) -> Any:
        ends = torch.tensor([0, *lengths], dtype=torch.int32, device=accelerator.device())
        ends = ends.cumsum(0, dtype=torch.int32)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            total_tokens=sum(lengths) if with_documents else None,
        )

    return make

"""Floating-point operations per token, counted per layer kind from a `ModelConfig`.

Plain arithmetic: no torch. A product of [m, k] by [k, n] is 2mkn operations (a multiply and an
add each). Counted are the products of every layer, the causal convolution and the state-space
scan; not counted are norms, activations, RoPE, softmax, biases, dropout and the embedding lookup,
which are below one percent. These are model FLOPs: what the mathematics needs, in whatever layout
and chunk size, without activation recomputation, padding of experts or communication.

Letters: h hidden, d Mamba inner width, G groups, N state, H Mamba heads, K convolution width,
Q scan chunk, S sequence, V vocabulary; n heads, g key/value heads, a/r/v MLA's widths without
position, with position and of values, q/c its query and key/value latents; f expert width,
E experts, k experts per token. `docs/reference/flops.md` compares with what other trainers count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from equilibrium_mcore.config.heads import has_output, has_scalar_head
from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.pattern import ByKind, count_kinds
from equilibrium_mcore.config.schema import (
    AttentionConfig,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from equilibrium_mcore.files.tables import markdown_table

TRAINING_FACTOR = 3
"""Backward makes two products (by input, by weight) for each one of forward."""


def flops_per_token(
    model: ModelConfig, sequence_length: int, *, causal: bool = True
) -> dict[str, int]:
    """Forward FLOPs per token of all layers of each kind, and of the heads.

    Holds the kinds that the model has, in the order of `KINDS`; their sum is the model's forward.

    `causal=True` counts half of the attention products, S/2 keys per token, since the other half
    is masked (exactly it is (S+1)/2). `causal=False` counts all S keys, as a kernel executes that
    masks without skipping. Layers other than attention do not depend on it.
    Raises ValueError for a sequence length below 1 and for a kind whose settings are missing.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1 token")
    counts = count_kinds(model.layer_pattern)
    for kind in counts:
        if getattr(model, kind) is None:
            raise ValueError(
                f"{model.name}: layer_pattern {model.layer_pattern!r} has {kind} layers, "
                f"but the model has no `{kind}:` section"
            )
    total: dict[str, int] = {}
    for kind, number in counts.items():
        per_layer = LAYER_FLOPS[kind](model, sequence_length, causal)
        total |= {work: number * flops for work, flops in per_layer.items()}
    if has_output(model):
        total["lm_head"] = 2 * model.hidden_size * model.padded_vocab_size
    if has_scalar_head(model):
        total["scalar_head"] = 2 * model.hidden_size
    return total


def training_flops_per_token(
    model: ModelConfig, sequence_length: int, *, causal: bool = True
) -> int:
    """FLOPs of forward and backward per token: three times the sum of `flops_per_token`.

    Divide by seconds and devices to get the model FLOP/s that the log line shows.
    """
    forward = flops_per_token(model, sequence_length, causal=causal)
    return TRAINING_FACTOR * sum(forward.values())


def mamba_flops_per_token(mamba: MambaConfig, hidden_size: int) -> int:
    """One Mamba-2 layer: `2h(2d+2GN+H)` in, `2K(d+2GN)` convolution, `7dN` scan, `2dh` out.

    `in_proj` makes z, x, B, C and dt; the convolution runs over x, B and C. The recurrence alone
    needs 5 operations per channel and state (decay, B*x, their sum, and 2 for C*state); 7 is
    Megatron-LM's figure (`mamba_layer_flops`), kept so that utilisation compares. It does not
    depend on the chunk size; what a chunked kernel does is `executed_scan_flops_per_token`.
    Source: arXiv 2405.21060, section 6; `megatron.core.ssm.mamba_mixer.MambaMixer`.
    """
    inner = mamba.num_heads * mamba.head_dim
    groups_state = mamba.num_groups * mamba.state_dim
    in_proj = 2 * hidden_size * (2 * inner + 2 * groups_state + mamba.num_heads)
    convolution = 2 * mamba.conv_width * (inner + 2 * groups_state)
    scan = 7 * inner * mamba.state_dim
    out_proj = 2 * inner * hidden_size
    return in_proj + convolution + scan + out_proj


def executed_scan_flops_per_token(mamba: MambaConfig, chunk_size: int | None = None) -> float:
    """What the chunked scan of one layer does: `2QGN + 2Qd + 4dN + 2dN/Q`, full Q x Q blocks.

    The terms: C B^T inside a chunk, its product with x, chunk states and their use, and the
    passing of states between chunks (multiply and add, once per chunk). `chunk_size` (default:
    the model's) changes it, so it is for comparing kernels with a roof, never for utilisation.
    Source: arXiv 2405.21060, section 6 and listing 1.
    """
    chunk = mamba.chunk_size if chunk_size is None else chunk_size
    inner = mamba.num_heads * mamba.head_dim
    within = 2 * chunk * mamba.num_groups * mamba.state_dim + 2 * chunk * inner
    across = 4 * inner * mamba.state_dim + 2 * inner * mamba.state_dim / chunk
    return within + across


def attention_core_flops_per_token(
    *, num_heads: int, qk_head_dim: int, v_head_dim: int, sequence_length: int, causal: bool
) -> int:
    """Scores and weighted values: `2Sn(qk + v)` in full, `Sn(qk + v)` causal.

    Grouped key/value heads do not make it smaller: every query head meets every key.
    """
    full = 2 * sequence_length * num_heads * (qk_head_dim + v_head_dim)
    return full // 2 if causal else full


def attention_flops_per_token(
    attention: AttentionConfig, hidden_size: int, sequence_length: int, *, causal: bool = True
) -> int:
    """One GQA layer of head width d: `2h(n+2g)d` q, k, v, `2nd*h` out, `2Snd` causal core.

    Without the causal half the core is `4Snd`. Source: arXiv 2305.13245;
    `megatron.core.transformer.attention.SelfAttention` (`linear_qkv`, `linear_proj`).
    """
    heads, width = attention.num_heads, attention.head_dim
    qkv = 2 * hidden_size * (heads + 2 * attention.num_query_groups) * width
    out_proj = 2 * heads * width * hidden_size
    core = attention_core_flops_per_token(
        num_heads=heads,
        qk_head_dim=width,
        v_head_dim=width,
        sequence_length=sequence_length,
        causal=causal,
    )
    return qkv + core + out_proj


def mla_flops_per_token(
    mla: MLAConfig, hidden_size: int, sequence_length: int, *, causal: bool = True
) -> int:
    """One MLA layer: `2hq + 2qn(a+r) + 2h(c+r) + 2cn(a+v) + 2nvh`, core `Sn(a+r+v)` causal.

    Without a query latent the first two terms are `2hn(a+r)`; without the causal half the core is
    `2Sn(a+r+v)`. This is training, where keys and values are expanded from the latent; a decoder
    that absorbs the up-projections counts otherwise.
    Source: arXiv 2405.04434, section 2.1; `megatron.core.transformer.multi_latent_attention`.
    """
    heads = mla.num_heads
    qk_width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.q_lora_rank is None:
        query = 2 * hidden_size * heads * qk_width
    else:
        query = 2 * mla.q_lora_rank * (hidden_size + heads * qk_width)
    kv_down = 2 * hidden_size * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    kv_up = 2 * mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    out_proj = 2 * heads * mla.v_head_dim * hidden_size
    core = attention_core_flops_per_token(
        num_heads=heads,
        qk_head_dim=qk_width,
        v_head_dim=mla.v_head_dim,
        sequence_length=sequence_length,
        causal=causal,
    )
    return query + kv_down + kv_up + core + out_proj


def mlp_flops_per_token(mlp: MLPConfig, hidden_size: int) -> int:
    """One dense MLP of width f: `6hf` gated (SwiGLU: gate, up, down), `4hf` otherwise.

    Source: arXiv 2002.05202; `megatron.core.transformer.mlp.MLP` (`linear_fc1`, `linear_fc2`).
    """
    return _feed_forward_flops(hidden_size, mlp.ffn_hidden_size, mlp.activation)


def moe_flops_per_token(moe: MoEConfig, hidden_size: int) -> dict[str, int]:
    """One MoE layer, gated: `6hfk` routed, `6h*f_shared` shared, `2hE` router; 4 for 6 ungated.

    Only the k chosen experts count, as if no token were dropped or padded. `moe_shared` is absent
    without shared experts. Source: arXiv 2401.06066; `megatron.core.transformer.moe`.
    """
    routed_width = moe.top_k * moe.expert_ffn_hidden_size
    flops = {"moe_routed": _feed_forward_flops(hidden_size, routed_width, moe.activation)}
    if moe.shared_ffn_hidden_size:
        flops["moe_shared"] = _feed_forward_flops(
            hidden_size, moe.shared_ffn_hidden_size, moe.activation
        )
    flops["moe_router"] = 2 * hidden_size * moe.num_experts
    return flops


def _feed_forward_flops(hidden_size: int, width: int, activation: str) -> int:
    matrices = 3 if activation == "swiglu" else 2
    return 2 * matrices * hidden_size * width


WORK: ByKind[tuple[str, ...]] = {
    "mamba": ("mamba",),
    "mla": ("mla",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "moe": ("moe_routed", "moe_shared", "moe_router"),
}
"""The kinds of work in a layer; the last kind's are distinguished."""

KINDS = (*(work for of_kind in WORK.values() for work in of_kind), "lm_head", "scalar_head")
"""All kinds of work, in the order of every table."""

LAYER_FLOPS: ByKind[Callable[[ModelConfig, int, bool], dict[str, int]]] = {
    "mamba": lambda model, _, __: {"mamba": mamba_flops_per_token(model.mamba, model.hidden_size)},
    "mla": lambda model, length, causal: {
        "mla": mla_flops_per_token(model.mla, model.hidden_size, length, causal=causal)
    },
    "attention": lambda model, length, causal: {
        "attention": attention_flops_per_token(
            model.attention, model.hidden_size, length, causal=causal
        )
    },
    "mlp": lambda model, _, __: {"mlp": mlp_flops_per_token(model.mlp, model.hidden_size)},
    "moe": lambda model, _, __: moe_flops_per_token(model.moe, model.hidden_size),
}
"""Forward FLOPs per token of one layer by work: of (model, sequence length, causal)."""

# ------------------------------------------------------------------------------ the printed table


def flops_table(models: Sequence[ModelConfig], sequence_length: int) -> str:
    """A Markdown table: forward MFLOPs per token by kind, and GFLOPs of training, per model."""
    counts = [flops_per_token(model, sequence_length) for model in models]
    kinds = [kind for kind in KINDS if any(kind in count for count in counts)]
    header = ["model", *kinds, "forward", "training (GFLOPs)", "un-halved (GFLOPs)"]
    rows = []
    for model, count in zip(models, counts, strict=True):
        training = training_flops_per_token(model, sequence_length)
        full = training_flops_per_token(model, sequence_length, causal=False)
        cells = [_cell(count, kind) for kind in kinds]
        total = f"{sum(count.values()) / 1e6:,.2f}"
        rows.append([model.name, *cells, total, f"{training / 1e9:,.3f}", f"{full / 1e9:,.3f}"])
    return markdown_table(header, rows, align="lr")


def _cell(count: Mapping[str, int], kind: str) -> str:
    """MFLOPs and share of the forward, or a dash for a kind that the model lacks."""
    if kind not in count:
        return "-"
    return f"{count[kind] / 1e6:,.2f} ({count[kind] / sum(count.values()):.1%})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the models named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m equilibrium_mcore.models.flops",
        description="Print FLOPs per token by layer kind (forward MFLOPs, share of the forward).",
        epilog="example: python -m equilibrium_mcore.models.flops "
        "equilibrium_3b --sequence-length 4096",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="a YAML file or name, see configs/models"
    )
    parser.add_argument(
        "--sequence-length", type=int, default=4096, help="tokens per sequence (default 4096)"
    )
    parsed = parser.parse_args(arguments)
    try:
        models = [load_model(model) for model in parsed.models]
        print(flops_table(models, parsed.sequence_length))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""FLOPs per token against torch's own counter, on the matmuls that megatron-core's modules do."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv1d, linear
from torch.utils.flop_counter import FlopCounterMode

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.schema import (
    AttentionConfig,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from equilibrium_mcore.models import flops

ROOT = Path(__file__).parents[2]
SEQUENCE = 24
HIDDEN = 40
MAMBA = MambaConfig(num_heads=6, head_dim=8, state_dim=5, num_groups=2, conv_width=3, chunk_size=4)
ATTENTION = AttentionConfig(num_heads=6, num_query_groups=2, head_dim=7)
MLA = MLAConfig(
    num_heads=3,
    q_lora_rank=11,
    kv_lora_rank=13,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=6,
)
MOE = MoEConfig(num_experts=10, top_k=3, expert_ffn_hidden_size=9, shared_ffn_hidden_size=17)
MODEL = ModelConfig(
    name="every kind of channel mixer",
    layer_pattern="ME|M-+E",
    hidden_size=HIDDEN,
    vocab_size=250,
    vocab_size_multiple=128,
    mamba=MAMBA,
    mla=MLA,
    mlp=MLPConfig(ffn_hidden_size=23),
    moe=MOE,
)


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.empty(rows, columns, device="meta")


def counted(function) -> int:
    """FLOPs of `function` over `SEQUENCE` tokens, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        function(torch.empty(SEQUENCE, HIDDEN, device="meta"))
    return counter.get_total_flops()


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full attention by two products; q, k, v are [heads, S, width], the result [S, heads*v]."""
    return ((query @ key.mT) @ value).transpose(0, 1).flatten(1)


def feed_forward(width: int, activation: str):
    def forward(x: torch.Tensor) -> torch.Tensor:
        gated = activation == "swiglu"
        inner = linear(x, weight(2 * width if gated else width, HIDDEN))
        if gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = gate * up
        return linear(inner, weight(HIDDEN, width))

    return forward


def test_mamba_linears_and_convolution_are_exact():
    inner = MAMBA.num_heads * MAMBA.head_dim
    convolved = inner + 2 * MAMBA.num_groups * MAMBA.state_dim

    def mixer(x):
        z_xbc_dt = linear(x, weight(inner + convolved + MAMBA.num_heads, HIDDEN))
        _, xbc, _ = z_xbc_dt.split([inner, convolved, MAMBA.num_heads], dim=-1)
        taps = torch.empty(convolved, 1, MAMBA.conv_width, device="meta")
        causal = torch.nn.functional.pad(xbc.mT[None], (MAMBA.conv_width - 1, 0))
        xbc = conv1d(causal, taps, groups=convolved)[0].mT
        linear(xbc[:, :inner], weight(HIDDEN, inner))

    scan = 7 * inner * MAMBA.state_dim
    assert counted(mixer) == SEQUENCE * (flops.mamba_flops_per_token(MAMBA, HIDDEN) - scan)


def test_executed_scan_is_what_a_chunked_scan_multiplies():
    heads, width, state, groups = 6, 8, 5, 2
    chunk, chunks = MAMBA.chunk_size, SEQUENCE // MAMBA.chunk_size
    meta = {"device": "meta"}

    def scan(_):
        b = torch.empty(chunks, groups, chunk, state, **meta)
        c = torch.empty(chunks, groups, chunk, state, **meta)
        x = torch.empty(chunks, heads, chunk, width, **meta)
        scores = (c @ b.mT).repeat_interleave(heads // groups, dim=1)
        scores @ x
        states = x.mT @ b.repeat_interleave(heads // groups, dim=1)
        c.repeat_interleave(heads // groups, dim=1) @ states.mT

    # Passing states on is elementwise, so torch's counter leaves it out: a multiply and an add.
    passing = 2 * chunks * heads * width * state
    assert counted(scan) + passing == SEQUENCE * flops.executed_scan_flops_per_token(MAMBA)


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_query_attention_is_exact(causal):
    heads, groups, width = 6, 2, 7

    def attention(x):
        qkv = linear(x, weight((heads + 2 * groups) * width, HIDDEN))
        query, key, value = (
            part.unflatten(-1, (-1, width)).transpose(0, 1)
            for part in qkv.split([heads * width, groups * width, groups * width], dim=-1)
        )
        key, value = (part.repeat_interleave(heads // groups, dim=0) for part in (key, value))
        linear(attend(query, key, value), weight(HIDDEN, heads * width))

    masked = SEQUENCE * SEQUENCE * heads * 2 * width if causal else 0
    assert counted(attention) - masked == SEQUENCE * flops.attention_flops_per_token(
        ATTENTION, HIDDEN, SEQUENCE, causal=causal
    )


@pytest.mark.parametrize("q_lora_rank", [11, None])
@pytest.mark.parametrize("causal", [True, False])
def test_mla_is_exact(q_lora_rank, causal):
    mla = MLA.model_copy(update={"q_lora_rank": q_lora_rank})
    heads, nope, rope, value_width, latent = 3, 5, 4, 6, 13

    def attention(x):
        latent_query = x if q_lora_rank is None else linear(x, weight(q_lora_rank, HIDDEN))
        query = linear(latent_query, weight(heads * (nope + rope), latent_query.shape[-1]))
        query = query.unflatten(-1, (heads, -1)).transpose(0, 1)
        compressed, key_rope = linear(x, weight(latent + rope, HIDDEN)).split([latent, rope], -1)
        expanded = linear(compressed, weight(heads * (nope + value_width), latent))
        key, value = expanded.unflatten(-1, (heads, -1)).split([nope, value_width], dim=-1)
        key = torch.cat([key, key_rope[:, None].expand(-1, heads, -1)], dim=-1)
        mixed = attend(query, key.transpose(0, 1), value.transpose(0, 1))
        linear(mixed, weight(HIDDEN, heads * value_width))

    masked = SEQUENCE * SEQUENCE * heads * (nope + rope + value_width) if causal else 0
    assert counted(attention) - masked == SEQUENCE * flops.mla_flops_per_token(
        mla, HIDDEN, SEQUENCE, causal=causal
    )


@pytest.mark.parametrize("activation", ["swiglu", "relu2", "gelu"])
def test_mlp_is_exact(activation):
    mlp = MLPConfig(ffn_hidden_size=23, activation=activation)
    expected = SEQUENCE * flops.mlp_flops_per_token(mlp, HIDDEN)
    assert counted(feed_forward(23, activation)) == expected


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_moe_is_exact(activation):
    moe = MOE.model_copy(update={"activation": activation})
    got = flops.moe_flops_per_token(moe, HIDDEN)

    def routed(x):
        # Each token visits top_k experts, so top_k * S rows pass through experts in all.
        feed_forward(MOE.expert_ffn_hidden_size, activation)(x.repeat(MOE.top_k, 1))

    def router(x):
        linear(x, weight(MOE.num_experts, HIDDEN))

    shared = feed_forward(MOE.shared_ffn_hidden_size, activation)
    assert counted(routed) == SEQUENCE * got["moe_routed"]
    assert counted(shared) == SEQUENCE * got["moe_shared"]
    assert counted(router) == SEQUENCE * got["moe_router"]


def test_moe_without_shared_experts_has_no_shared_kind():
    moe = MOE.model_copy(update={"shared_ffn_hidden_size": 0})
    assert set(flops.moe_flops_per_token(moe, HIDDEN)) == {"moe_routed", "moe_router"}


def test_lm_head_is_exact_and_counts_padded_rows():
    got = flops.flops_per_token(MODEL, SEQUENCE)["lm_head"]
    assert counted(lambda x: linear(x, weight(256, HIDDEN))) == SEQUENCE * got


def test_a_model_is_the_sum_of_its_layers():
    got = flops.flops_per_token(MODEL, SEQUENCE)
    moe = flops.moe_flops_per_token(MOE, HIDDEN)
    assert got == {
        "mamba": 2 * flops.mamba_flops_per_token(MAMBA, HIDDEN),
        "mla": flops.mla_flops_per_token(MLA, HIDDEN, SEQUENCE),
        "mlp": flops.mlp_flops_per_token(MODEL.mlp, HIDDEN),
        "moe_routed": 2 * moe["moe_routed"],
        "moe_shared": 2 * moe["moe_shared"],
        "moe_router": 2 * moe["moe_router"],
        "lm_head": 2 * HIDDEN * 256,
    }
    assert list(got) == [kind for kind in flops.KINDS if kind in got]
    assert flops.training_flops_per_token(MODEL, SEQUENCE) == 3 * sum(got.values())


def test_only_attention_depends_on_causality_and_sequence():
    short, long = (flops.flops_per_token(MODEL, length) for length in (SEQUENCE, 2 * SEQUENCE))
    full = flops.flops_per_token(MODEL, SEQUENCE, causal=False)
    assert {kind for kind in short if short[kind] != long[kind]} == {"mla"}
    # Half of 2S keys is all of S keys.
    assert full == long


def test_bad_input_says_what_is_wrong():
    with pytest.raises(ValueError, match="sequence_length=0"):
        flops.flops_per_token(MODEL, 0)
    with pytest.raises(ValueError, match="no `mla:` section"):
        flops.flops_per_token(MODEL.model_copy(update={"mla": None}), SEQUENCE)


def test_command_prints_shares_that_sum_to_the_whole(tmp_path, capsys):
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.model_dump_json(), encoding="utf-8")  # JSON is YAML
    flops.main([str(path), "--sequence-length", "24"])
    header, _, row = capsys.readouterr().out.strip().splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    shares = [float(cell.split("(")[1].rstrip("%)")) for cell in cells.values() if "%" in cell]
    assert len(shares) == 7
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_command_names_a_missing_file(tmp_path):
    with pytest.raises(SystemExit, match="absent.yaml"):
        flops.main([str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/models").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_table_in_the_docs_is_current(path):
    count = flops.flops_per_token(load_model(path), 4096)
    training = flops.training_flops_per_token(load_model(path), 4096)
    table = (ROOT / "docs/reference/flops.md").read_text(encoding="utf-8").splitlines()
    row = next((line for line in table if line.startswith(f"| {path.stem} |")), "no row")
    cells = [f"{value / 1e6:,.2f} ({value / sum(count.values()):.1%})" for value in count.values()]
    assert [cell.strip() for cell in row.split("|") if "%" in cell] == cells
    assert f" {training / 1e9:,.3f} |" in row

"""Configuration of an Equilibrium model: a pattern of Mamba-2, attention, MLP and MoE layers.

This file travels with the weights and needs transformers alone. Run with transformers 5.16.1,
5.19.0 and 5.23.0.
"""

from typing import ClassVar

from transformers.configuration_utils import PreTrainedConfig

# One letter per layer. A cache keeps a state for the first, keys and values for the next two, and
# nothing for the last two; "moe" is transformers' name for a layer without one.
LAYER_TYPES = {
    "M": "linear_attention",
    "+": "full_attention",
    "*": "full_attention",
    "-": "moe",
    "E": "moe",
}


class EquilibriumConfig(PreTrainedConfig):
    """Shapes and switches of a model; names follow NemotronH and DeepSeek-V3 where they agree.

    `layer_pattern` has one letter per layer: `M` Mamba-2, `+` multi-head latent attention, `*`
    grouped-query attention, `-` MLP, `E` mixture of experts. Every layer is
    `x + mixer(RMSNorm(x))`. `head_dim` is the width of a head in `*`, and the width that RoPE
    turns in `+`. Activations are `swiglu`, `relu2` or `gelu`; `score_function` is `softmax` or
    `sigmoid`.
    """

    model_type = "equilibrium"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "n_routed_experts"}

    layer_pattern: str = "ME+E"
    vocab_size: int = 65536
    hidden_size: int = 1536
    tie_word_embeddings: bool = False
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    # M
    mamba_num_heads: int = 48
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    mamba_norm_epsilon: float = 1e-5

    # + and *
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    attention_bias: bool = False
    use_rope: bool = True
    rope_parameters: dict | None = None

    # +
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    # -
    intermediate_size: int = 4096
    mlp_activation: str = "swiglu"

    # E
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 320
    moe_shared_expert_intermediate_size: int = 640
    moe_activation: str = "swiglu"
    score_function: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    use_expert_bias: bool = False

    # What the blocks of transformers read and this architecture fixes.
    num_logits_to_keep: ClassVar[int] = 1
    use_mamba_kernels: ClassVar[bool] = True
    mamba_hidden_act: ClassVar[str] = "silu"
    use_conv_bias: ClassVar[bool] = True
    use_bias: ClassVar[bool] = False
    mlp_bias: ClassVar[bool] = False
    hidden_act: ClassVar[str] = "silu"
    mlp_hidden_act: ClassVar[str] = "relu2"
    time_step_min: ClassVar[float] = 0.001  # of a fresh dt_bias only
    time_step_max: ClassVar[float] = 0.1
    time_step_floor: ClassVar[float] = 1e-4
    rescale_prenorm_residual: ClassVar[bool] = False
    attention_dropout: ClassVar[float] = 0.0
    rope_interleave: ClassVar[bool] = True
    n_group: ClassVar[int] = 1
    topk_group: ClassVar[int] = 1
    moe_latent_size: ClassVar[int | None] = None

    def __post_init__(self, **kwargs):
        unknown = set(self.layer_pattern) - set(LAYER_TYPES)
        if unknown or not self.layer_pattern:
            raise ValueError(
                f"layer_pattern={self.layer_pattern!r} must have one of {' '.join(LAYER_TYPES)} "
                f"per layer"
            )
        self.num_hidden_layers = len(self.layer_pattern)
        self.layer_types = [LAYER_TYPES[letter] for letter in self.layer_pattern]
        # Both follow from the pattern, so a config.json cannot contradict it.
        kwargs.pop("num_hidden_layers", None)
        kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)

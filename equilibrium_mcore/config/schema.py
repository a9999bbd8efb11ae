"""Every setting of a run, declared once: its name, type, default, range and meaning.

Plain values: this package imports no torch, numpy or megatron. The sections of data, objectives
and optimizers are in files of their own. Rules that tie several settings together are in
`rules.py`; reading YAML and the command line is in `load.py`.
"""

from __future__ import annotations

from typing import Literal

from equilibrium_mcore.config.adapters import LoraConfig
from equilibrium_mcore.config.anomalies import AnomaliesConfig
from equilibrium_mcore.config.data_kinds import DataChoice
from equilibrium_mcore.config.fused import FusedConfig, GraphModule
from equilibrium_mcore.config.judges import JudgeConfig
from equilibrium_mcore.config.objectives import NextTokenConfig, ObjectiveConfig
from equilibrium_mcore.config.online import EvaluationConfig, RewardsChoice, RolloutConfig
from equilibrium_mcore.config.optimizers import OptimizerConfig
from equilibrium_mcore.config.pattern import LABELS, LAYER_KINDS
from equilibrium_mcore.config.section import (
    Epsilon,
    Minutes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    UserPath,
    setting,
)

# --------------------------------------------------------------------------------- the model


class MambaConfig(Section):
    """Mamba-2 mixer (`M`): arXiv 2405.21060."""

    num_heads: PositiveInt = setting(doc="heads; the inner width is num_heads * head_dim")
    head_dim: PositiveInt = setting(64, "channels per head (P)")
    state_dim: PositiveInt = setting(128, "state size per channel (N)")
    num_groups: PositiveInt = setting(8, "groups that share B and C (G)")
    conv_width: PositiveInt = setting(4, "taps of the causal convolution")
    chunk_size: PositiveInt = setting(128, "tokens per chunk of the SSD scan; changes speed only")


class AttentionConfig(Section):
    """Grouped-query attention (`*`)."""

    num_heads: PositiveInt = setting(doc="query heads")
    num_query_groups: PositiveInt = setting(doc="key/value heads")
    head_dim: PositiveInt = setting(doc="width of a head")
    qkv_bias: bool = setting(False, "bias on the query, key and value projections (Qwen2)")
    rope_base: PositiveFloat | None = setting(10000.0, "RoPE base; null for no position embedding")


class MLAConfig(Section):
    """Multi-Head Latent Attention (`+`): DeepSeek-V2, arXiv 2405.04434."""

    num_heads: PositiveInt = setting(doc="heads")
    q_lora_rank: PositiveInt | None = setting(doc="width of the query latent; null for none")
    kv_lora_rank: PositiveInt = setting(doc="width of the key/value latent: what a cache stores")
    qk_nope_head_dim: PositiveInt = setting(doc="query/key width without position, per head")
    qk_rope_head_dim: PositiveInt = setting(doc="query/key width with RoPE, per head; even")
    v_head_dim: PositiveInt = setting(doc="value width per head")
    rope_base: PositiveFloat = setting(10000.0, "RoPE base")


class MLPConfig(Section):
    """Dense channel mixer (`-`)."""

    ffn_hidden_size: PositiveInt = setting(doc="inner width")
    activation: Literal["swiglu", "relu2", "gelu"] = setting("swiglu", "non-linearity")


class MoEConfig(Section):
    """Fine-grained mixture of experts with shared experts (`E`): DeepSeekMoE, arXiv 2401.06066."""

    num_experts: PositiveInt = setting(doc="routed experts")
    top_k: PositiveInt = setting(doc="routed experts per token")
    expert_ffn_hidden_size: PositiveInt = setting(doc="inner width of one routed expert")
    shared_ffn_hidden_size: NonNegativeInt = setting(0, "total inner width of the shared experts")
    activation: Literal["swiglu", "relu2", "gelu"] = setting("swiglu", "non-linearity")
    score_function: Literal["softmax", "sigmoid"] = setting("softmax", "router scores")
    normalize_top_k: bool = setting(True, "scale the chosen scores to sum to 1")
    routed_scaling_factor: PositiveFloat = setting(1.0, "factor on the chosen scores")
    load_balancing: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = setting(
        "aux_loss",
        "what keeps the experts evenly used; global_aux_loss needs one micro-batch per step",
    )
    aux_loss_coefficient: NonNegativeFloat = setting(0.001, "weight of the balancing loss")
    z_loss_coefficient: NonNegativeFloat = setting(0.0, "weight of the router z-loss")
    expert_bias: bool = setting(
        False, "aux-free balancing by a bias on the scores; needs score_function: sigmoid"
    )
    expert_bias_update_rate: NonNegativeFloat = setting(0.001, "step of that bias")


_LETTERS = ", ".join(f"{letter} {LABELS[kind]}" for letter, kind in LAYER_KINDS.items())


class ModelConfig(Section):
    """A model: megatron-core's HybridModel, described by values."""

    name: str = setting(doc="what the model is called in logs and in the released model card")
    layer_pattern: str = setting(
        doc=f"one letter per layer: {_LETTERS}; | where a pipeline stage may end"
    )
    hidden_size: PositiveInt = setting(doc="width of the residual stream")
    vocab_size: PositiveInt = setting(doc="tokens of the vocabulary")
    vocab_size_multiple: PositiveInt = setting(
        128, "the embedding table is padded to a multiple of this, whatever the layout"
    )
    tie_embeddings: bool = setting(False, "use the embedding table as the output layer")
    head: Literal["output", "scalar", "both"] = setting(
        "output",
        "what the last layer's states become: logits, one number per token (a reward model, a "
        "critic), or both",
    )
    norm_epsilon: Epsilon = setting(1e-5, "epsilon of every RMSNorm")
    init_std: PositiveFloat = setting(0.02, "standard deviation of initial weights")
    mamba: MambaConfig | None = setting(None, "needed by M")
    attention: AttentionConfig | None = setting(None, "needed by *")
    mla: MLAConfig | None = setting(None, "needed by +")
    mlp: MLPConfig | None = setting(None, "needed by -")
    moe: MoEConfig | None = setting(None, "needed by E")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        multiple = self.vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple


# ----------------------------------------------------------------------------------- the run


class ParallelismConfig(Section):
    """How the model and the batch are laid over ranks.

    The data-parallel size is what is left: world size / (tensor * pipeline * context).
    """

    tensor: PositiveInt = setting(1, "tensor-parallel ranks (TP)")
    sequence: bool = setting(False, "shard activations along the sequence between TP regions (SP)")
    pipeline: PositiveInt = setting(1, "pipeline stages on different ranks (PP)")
    virtual_pipeline: PositiveInt = setting(1, "model chunks per pipeline rank (VPP)")
    expert: PositiveInt = setting(1, "ranks that share the routed experts (EP)")
    expert_tensor: PositiveInt = setting(1, "tensor-parallel ranks inside an expert (ETP)")
    context: PositiveInt = setting(1, "ranks that share one sequence (CP)")
    world_size: PositiveInt | None = setting(
        None,
        "ranks in all; null: as many as the launcher started, or the fewest that hold the layout "
        "when started plainly",
    )
    distributed_optimizer: bool = setting(
        True, "keep main weights and optimizer state of each parameter on one DP rank only"
    )
    overlap_grad_reduce: bool = setting(False, "reduce gradients while backward runs")
    gradient_bucket_size: PositiveInt | None = setting(
        None,
        "overlap_grad_reduce: elements that are reduced together; null: megatron-core's choice, 40 "
        "million or 1 million per DP rank",
    )
    overlap_shared_experts: bool = setting(
        False, "compute shared experts while tokens travel to the routed ones"
    )
    moe_dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = setting(
        "alltoall",
        "how tokens travel to their experts; deepep and hybridep: megatron-core's flex dispatcher "
        "with that library, on GPUs",
    )
    context_exchange: Literal["p2p", "a2a", "all_gather"] | None = setting(
        None,
        "what CP ranks exchange for attention (megatron-core's cp_comm_type): keys and values in a "
        "ring, heads against positions, or all keys and values; null: p2p with Transformer Engine, "
        "a2a with backend torch",
    )
    timeout_minutes: Minutes = setting(10, "after this long a stuck collective is an error")


class TrainingConfig(Section):
    """Batches, steps and numerics."""

    sequence_length: PositiveInt = setting(doc="tokens per sequence")
    micro_batch_size: PositiveInt = setting(1, "sequences per forward pass on a DP rank")
    global_batch_size: PositiveInt = setting(doc="sequences per optimizer step, over all ranks")
    steps: PositiveInt | None = setting(
        None,
        "optimizer steps of the whole run; the schedule ends there. Or give `epochs`",
    )
    epochs: PositiveFloat | None = setting(
        None,
        "instead of `steps`: passes over the training data; the number of steps is computed and "
        "printed when the run starts",
    )
    stop_after_steps: PositiveInt | None = setting(
        None, "save and stop at this step, to be resumed later; null: run to the end"
    )
    frozen: list[str] = setting(
        [],
        "parameters that do not train: names with * for any text, as tools/show_param_groups.py "
        "prints them, e.g. embedding.*",
    )
    anomalies: AnomaliesConfig | None = setting(
        None,
        "what is done about a spike; null: steps are not judged, and only a gradient norm that is "
        "not finite ends the run",
    )
    compare_replicas: bool = setting(
        True,
        "at every step, whether ranks that should hold the same weights do, and whether no element "
        "changed by more than its optimizer can change it",
    )
    left_out: list[tuple[NonNegativeInt, PositiveInt]] = setting(
        [],
        "samples that are passed over, [first, count] by their position in the data, as a "
        "rollback notes them in ledger.jsonl",
    )
    seed: Seed = setting(1234, "seed of weights, data order and dropout")
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = setting("bf16", "number format")
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = setting(
        "tensorwise", "precision fp8: Transformer Engine's recipe"
    )
    fp8_format: Literal["hybrid", "e4m3"] = setting(
        "hybrid", "precision fp8: hybrid is e4m3 forward and e5m2 backward"
    )
    recompute: Literal["none", "full", "selective"] = setting(
        "none", "which activations are recomputed in backward"
    )
    recompute_layers: PositiveInt = setting(1, "recompute full: layers between two checkpoints")
    recompute_modules: list[Literal["core_attn", "moe", "mlp", "moe_act", "mla_up_proj"]] = setting(
        ["core_attn"], "recompute selective: what is recomputed"
    )
    fused: FusedConfig = FusedConfig()
    cuda_graphs: list[GraphModule] = setting(
        [],
        "modules that are launched as CUDA graphs (megatron-core's, of its `local` kind); with "
        "moe_router the preprocessing of tokens",
    )
    validation_interval_steps: NonNegativeInt = setting(0, "steps between validations; 0: never")
    validation_batches: PositiveInt = setting(8, "global batches per validation")
    backend: Literal["auto", "torch", "transformer_engine"] = setting(
        "auto", "where modules come from; auto: Transformer Engine if installed, on a GPU"
    )


class CheckpointConfig(Section):
    """Saving and resuming."""

    save_interval_steps: NonNegativeInt = setting(0, "steps between saves; 0: only at the end")
    asynchronous: bool = setting(
        False,
        "training waits only until its state is copied, and a process of each rank writes the "
        "copy; needs that much more host memory",
    )
    keep_last: PositiveInt = setting(2, "how many checkpoints stay on disk")
    resume: Literal["auto", "never", "must"] = setting(
        "auto", "auto: from the latest checkpoint of the output directory, if there is one"
    )
    used_directory: Literal["refuse", "archive"] = setting(
        "refuse",
        "resume never, where an earlier run is in the output directory: archive moves it to "
        "archive/ there, whole",
    )
    resume_step: NonNegativeInt | None = setting(
        None, "with resume: must: this step's checkpoint and no other; null: the newest"
    )
    verify: bool = setting(True, "compare every file with its hash before it is loaded")
    initial_weights: UserPath | None = setting(
        None, "a checkpoint whose weights alone start the run; ignored when resuming"
    )


class LoggingConfig(Section):
    """What is written while training."""

    interval_steps: PositiveInt = setting(1, "steps between two log lines")
    tensorboard: bool = setting(True, "write TensorBoard events")
    wandb_project: str | None = setting(None, "log to this Weights & Biases project")
    wandb_run_name: str | None = setting(None, "the run's name there; null: `name`")
    peak_tflops_per_device: PositiveFloat | None = setting(
        None, "dense peak of one device in TFLOP/s, to print utilization"
    )


Stage = Literal[
    "pretrain",
    "midtrain",
    "sft",
    "lora",
    "distill",
    "dpo",
    "ipo",
    "simpo",
    "orpo",
    "kto",
    "reward_model",
    "rlaif",
    "grpo",
    "spo",
    "ppo",
    "opd",
]  # `stages.py` says what they are


class RunConfig(Section):
    """A whole run."""

    stage: Stage = setting("pretrain", "what the run is; it sets defaults of the other sections")
    name: str = setting(doc="name of the run")
    description: str = setting("", "what the run is for; kept with its config")
    tags: list[str] = setting([], "words to find the run by, here and in Weights & Biases")
    output_directory: UserPath = setting(doc="checkpoints, logs and the effective config go here")
    model: ModelConfig
    data: DataChoice = setting(doc="what is trained on; its `type` says which kind")
    parallelism: ParallelismConfig = ParallelismConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    objective: ObjectiveConfig = setting(
        NextTokenConfig(), "what is minimized; its `type` says which kind"
    )
    adapters: LoraConfig | None = setting(
        None, "small matrices beside the frozen weights, which alone train"
    )
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsChoice | None = setting(
        None, "what answers are worth: a list of rewards, or a mapping with `rewards`"
    )
    judge: JudgeConfig | None = setting(
        None, "stage rlaif: who says which of two answers is the better; its `type` says which kind"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

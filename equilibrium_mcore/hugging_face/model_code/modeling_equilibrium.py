"""Equilibrium: Mamba-2, latent or grouped-query attention, MLP and MoE layers in one pattern.

The blocks are transformers' own (NemotronH, DeepSeek-V3, Llama); this file puts them together and
sets what differs. It travels with the weights and needs torch and transformers alone. Run with
transformers 5.16.1, 5.19.0 and 5.23.0.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast, SequenceClassifierOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHBlock,
    NemotronHExperts,
    NemotronHForCausalLM,
    NemotronHMamba2Mixer,
    NemotronHMLP,
    NemotronHPreTrainedModel,
    NemotronHRMSNorm,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_equilibrium import EquilibriumConfig

GATED = "swiglu"
ACTIVATIONS = {"swiglu": "silu", "relu2": "relu2", "gelu": "gelu"}


class EquilibriumMamba(NemotronHMamba2Mixer):
    """Mamba-2 without a lower limit on the time step, as it was trained."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx=layer_idx)
        self.time_step_limit = (0.0, float("inf"))
        self.norm.variance_epsilon = config.mamba_norm_epsilon


class EquilibriumLatentAttention(DeepseekV3Attention):
    """Multi-head latent attention, with or without a query latent; the cache holds the latent."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        # DeepSeek's latent norms use 1e-6 whatever the config says.
        for norm in (self.q_a_layernorm, self.kv_a_layernorm):
            if norm is not None:
                norm.variance_epsilon = config.layer_norm_epsilon
        self.rotary_emb = DeepseekV3RotaryEmbedding(config)

    def forward(self, hidden_states, position_ids=None, **kwargs):
        positions = self.rotary_emb(hidden_states, position_ids)
        return super().forward(hidden_states, position_embeddings=positions, **kwargs)


class EquilibriumAttention(LlamaAttention):
    """Grouped-query attention; a bias, if any, on queries, keys and values but not the output."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width = config.num_attention_heads * config.head_dim
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config) if config.use_rope else None

    def forward(self, hidden_states, position_ids=None, **kwargs):
        if self.rotary_emb is None:  # a turn by no angle
            cos = hidden_states.new_ones(1, 1, self.head_dim)
            positions = cos, torch.zeros_like(cos)
        else:
            positions = self.rotary_emb(hidden_states, position_ids)
        return super().forward(hidden_states, position_embeddings=positions, **kwargs)


def build_mlp(config, activation, intermediate_size):
    """A gated or a plain MLP."""
    kind = DeepseekV3MLP if activation == GATED else NemotronHMLP
    mlp = kind(config, intermediate_size=intermediate_size)
    mlp.act_fn = ACT2FN[ACTIVATIONS[activation]]
    return mlp


class EquilibriumRouter(DeepseekV3TopkRouter):
    """Top-k routing by sigmoid scores, with or without a bias on the choice, or by softmax."""

    def __init__(self, config):
        super().__init__(config)
        self.score_function = config.score_function
        if not config.use_expert_bias:  # zeros, which no checkpoint holds
            zeros = torch.zeros(self.num_experts)
            self.register_buffer("e_score_correction_bias", zeros, persistent=False)

    def forward(self, hidden_states):
        if self.score_function == "sigmoid":
            return super().forward(hidden_states)
        hidden_states = hidden_states.view(-1, self.hidden_dim)
        router_logits = F.linear(hidden_states.float(), self.weight.float())
        weights, indices = router_logits.softmax(dim=-1).topk(self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return router_logits, weights * self.routed_scaling_factor, indices


class EquilibriumMoE(nn.Module):
    """Routed experts, plus shared experts that every token takes."""

    def __init__(self, config):
        super().__init__()
        self.gate = EquilibriumRouter(config)
        kind = DeepseekV3Experts if config.moe_activation == GATED else NemotronHExperts
        self.experts = kind(config)
        self.experts.act_fn = ACT2FN[ACTIVATIONS[config.moe_activation]]
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = build_mlp(config, config.moe_activation, shared) if shared else None

    def forward(self, hidden_states):
        _, weights, indices = self.gate(hidden_states)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        output = self.experts(tokens, indices, weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output


MIXERS = {
    "M": EquilibriumMamba,
    "+": EquilibriumLatentAttention,
    "*": EquilibriumAttention,
    "-": lambda config, _: build_mlp(config, config.mlp_activation, config.intermediate_size),
    "E": lambda config, _: EquilibriumMoE(config),
}


class EquilibriumBlock(NemotronHBlock):
    """`x + mixer(norm(x))`, the mixer chosen by the layer's letter."""

    def __init__(self, config, layer_idx):
        GradientCheckpointingLayer.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        self.block_type = config.layer_types[layer_idx]
        self.norm = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = MIXERS[config.layer_pattern[layer_idx]](config, layer_idx)


def build_masks(
    config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
):
    """The mask of each layer type in the pattern: causal for attention, padding for Mamba."""
    makers = {
        "full_attention": create_causal_mask,
        "linear_attention": create_recurrent_attention_mask,
    }
    return {
        kind: make(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        for kind, make in makers.items()
        if kind in config.layer_types
    }


class StateCache(DynamicCache):
    """A cache of Mamba states alone. No layer counts tokens in it, so it counts them itself."""

    tokens_seen = 0

    def get_seq_length(self, layer_idx=0):
        return self.tokens_seen


def new_cache(config):
    has_attention = "full_attention" in config.layer_types
    return (DynamicCache if has_attention else StateCache)(config=config)


class EquilibriumPreTrainedModel(NemotronHPreTrainedModel):
    config: EquilibriumConfig
    config_class = EquilibriumConfig
    _no_split_modules = ["EquilibriumBlock"]
    _can_record_outputs = {
        "hidden_states": EquilibriumBlock,
        "attentions": [EquilibriumAttention, EquilibriumLatentAttention],
        "router_logits": OutputRecorder(EquilibriumRouter, index=0),
    }
    # The state decays by exp(-exp(A_log) * dt) at every token: bfloat16 is too coarse for it.
    _keep_in_fp32_modules_strict = [
        "mixer.A_log",
        "mixer.D",
        "mixer.dt_bias",
        "e_score_correction_bias",
    ]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EquilibriumRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekV3Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class EquilibriumModel(EquilibriumPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [EquilibriumBlock(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (position_ids + seen).unsqueeze(0)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = build_masks(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids
            )

        if isinstance(past_key_values, StateCache):
            past_key_values.tokens_seen += inputs_embeds.shape[1]
        hidden_states = inputs_embeds
        for block in self.layers:
            hidden_states = block(
                hidden_states,
                attention_mask=masks.get(block.block_type),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class EquilibriumForCausalLM(EquilibriumPreTrainedModel, NemotronHForCausalLM):
    """The model with its language-model head; logits are float32, `(batch, tokens, vocabulary)`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.model = EquilibriumModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, inputs=None, **kwargs):
        settings = kwargs.get("generation_config") or self.generation_config
        use_cache = kwargs.get("use_cache", settings.use_cache)  # None stands for True
        if use_cache is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = new_cache(self.config)
        return super().generate(inputs, **kwargs)

    @staticmethod
    def create_masks_for_generate(config, **kwargs):
        return build_masks(config, **kwargs)


class EquilibriumForSequenceClassification(EquilibriumPreTrainedModel):
    """The model with a score for a text: its last token's. Logits are float32, `(batch, 1)`.

    With an `attention_mask` that is the last token with a 1, on whichever side padding stands;
    without one the last of all, since a padding token may end a text too.
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = EquilibriumModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def token_scores(self, input_ids, attention_mask=None):
        """A score for every token, `(batch, tokens)`: that of the text up to it."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return self._scores(hidden.last_hidden_state)[..., 0]

    def _scores(self, hidden_states):
        return nn.functional.linear(hidden_states.float(), self.score.weight.float())

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        kwargs.pop("use_cache", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        scores = self._scores(outputs.last_hidden_state)
        rows = torch.arange(scores.shape[0], device=scores.device)
        last = torch.full_like(rows, scores.shape[1] - 1)
        if attention_mask is not None:
            places = torch.arange(scores.shape[1], device=scores.device)
            last = (places * (attention_mask > 0)).argmax(-1)
        logits = scores[rows, last]
        loss = None
        if labels is not None:
            loss = nn.functional.mse_loss(logits.squeeze(-1), labels.float())
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states
        )

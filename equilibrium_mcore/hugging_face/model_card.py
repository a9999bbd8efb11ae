"""The README.md of an exported folder: what the model is, how it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from equilibrium_mcore.checkpoint.directory import step_of
from equilibrium_mcore.config.chat import ChatsConfig, JinjaTemplateConfig
from equilibrium_mcore.config.heads import has_scalar_head
from equilibrium_mcore.config.optimizers import OPTIMIZERS, REST, OptimizerConfig
from equilibrium_mcore.config.pattern import LABELS, LAYER_KINDS, ByKind, count_kinds, layers_of
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.tables import markdown_table

KIND_NAMES: ByKind[str] = {
    "mamba": "Mamba-2",
    "mla": "multi-head latent attention (MLA)",
    "attention": "grouped-query attention (GQA)",
    "mlp": "MLP",
    "moe": "mixture of experts (MoE)",
}
SHAPES: ByKind[Callable[[Any], str]] = {
    "mamba": lambda x: (
        f"{x.num_heads} heads of {x.head_dim}, state {x.state_dim}, {x.num_groups} groups"
    ),
    "mla": lambda x: (
        f"{x.num_heads} heads, query latent {x.q_lora_rank or 'none'}, key/value latent "
        f"{x.kv_lora_rank}, RoPE base {x.rope_base:g}"
    ),
    "attention": lambda x: (
        f"{x.num_heads} query and {x.num_query_groups} key/value heads of {x.head_dim}, RoPE base "
        f"{x.rope_base or 'none'}"
    ),
    "mlp": lambda x: f"width {x.ffn_hidden_size}, {x.activation}",
    "moe": lambda x: (
        f"{x.num_experts} experts of width {x.expert_ffn_hidden_size}, top {x.top_k} by "
        f"{x.score_function}, shared width {x.shared_ffn_hidden_size}, {x.activation}"
    ),
}
"""A section in words."""

CARD = """\
---
library_name: transformers
pipeline_tag: {task}
license: other
license_name: fill-in-before-publishing
---

# {name}

> **Licence: not chosen.** Whoever publishes this folder must choose a licence, name it in the
> header above (`license:`) and replace this notice. Until then nobody has a right to use it.

A {what} with {total:,} parameters, of which {active:,} work on each token.
{purpose}

## Use

```python
{use}
```

`trust_remote_code=True` runs `modeling_equilibrium.py` of this folder, which composes transformers'
own blocks. It was run with transformers 5.16.1, 5.19.0 and 5.23.0. Batches of unequal length are
padded on the left. Special tokens written out in a prompt are{not_parsed} read as such.

## Architecture

One residual layer per letter, `x + layer(RMSNorm(x))`: `{pattern}`

{layers}

{shapes}

## Training

{training}

{data}:

{sources}

Written from a Megatron-Core distributed checkpoint by equilibrium_mcore. Weights are {dtype}{kept}.
"""


GENERATES = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

{prompt}
output = model.generate(**prompt, max_new_tokens=64, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
SCORES = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

{prompt}
print(model(**prompt).logits)  # the score: read at the last token, which ends an answer"""

CONTINUES = "It continues text; it was not tuned to follow instructions or to refuse anything."
ANSWERS = "It was fine-tuned on conversations; it was not tuned to refuse anything."
TEXT_PROMPT = 'prompt = tokenizer("def fibonacci(n):", return_tensors="pt")'
JUDGES = "It gives answers a score: of two, the better one should have the larger."
SCORED_PROMPT = """\
messages = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A list is an ordered collection."},
]
prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
# Whatever a template writes after the end of the answer was not scored in training."""
CHAT_PROMPT = """\
messages = [{"role": "user", "content": "What is a list?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""


def model_card(
    config: RunConfig,
    *,
    checkpoint: Path,
    state: dict[str, Any],
    dtype: str,
    total_parameters: int,
    active_parameters: int,
    splits_special_tokens: bool,
    chat: bool = False,
) -> str:
    """The model card, in Markdown.

    `state` holds the checkpoint's facts (step, tokens); `active_parameters` are those that work on
    one token; `chat` is whether the folder has a chat template.
    """
    pattern = layers_of(config.model.layer_pattern)
    layers = [
        (f"`{letter}`", KIND_NAMES[kind], pattern.count(letter))
        for letter, kind in LAYER_KINDS.items()
        if letter in pattern
    ]
    data, sources = _sources(config)
    scores = has_scalar_head(config.model)
    prompt = TEXT_PROMPT
    if chat:
        prompt = SCORED_PROMPT if scores else CHAT_PROMPT
    return CARD.format(
        name=config.model.name,
        total=total_parameters,
        active=active_parameters,
        what="reward model" if scores else "language model",
        task="text-classification" if scores else "text-generation",
        purpose=_purpose(config),
        use=(SCORES if scores else GENERATES).format(prompt=prompt),
        not_parsed=" not" if splits_special_tokens else "",
        pattern=pattern,
        layers=markdown_table(("letter", "layer", "number"), layers),
        shapes=markdown_table(("", ""), _shapes(config)),
        training="\n".join(f"- {line}" for line in _training(config, checkpoint, state)),
        data=data,
        sources="\n".join(f"- {source}" for source in sources),
        dtype=dtype,
        kept=(
            "" if dtype == "float32" else "; `A_log`, `D`, `dt_bias` and expert biases are float32"
        ),
    )


def _purpose(config: RunConfig) -> str:
    if has_scalar_head(config.model):
        return JUDGES
    return ANSWERS if isinstance(config.data, ChatsConfig) else CONTINUES


def _sources(config: RunConfig) -> tuple[str, list[str]]:
    """What stands above the list of the data, and its lines."""
    data = config.data
    if isinstance(data, ChatsConfig):
        own = isinstance(data.template, JinjaTemplateConfig)
        template = "a chat template of its own" if own else f"chat template `{data.template}`"
        what = "Prompts" if data.type == "prompts" else "Conversations"
        return f"{what}, each once per epoch, {template}", [s.name for s in data.sources]
    total = sum(source.weight for source in data.sources)
    shares = [f"{source.name}: {source.weight / total:.1%}" for source in data.sources]
    return "Data, by share of the tokens drawn", shares


def _shapes(config: RunConfig) -> list[tuple[str, str]]:
    """Rows of the table of shapes."""
    m = config.model
    rows = [
        ("hidden width", str(m.hidden_size)),
        ("vocabulary", f"{m.vocab_size:,}, {'tied' if m.tie_embeddings else 'untied'}"),
    ]
    kinds = count_kinds(m.layer_pattern)
    return rows + [(LABELS[kind], SHAPES[kind](getattr(m, kind))) for kind in kinds]


def _origin(config: RunConfig) -> str:
    """What the run started from: by name, since a path says more of a host than of a model."""
    weights = config.checkpoint.initial_weights
    if weights is None:
        return "from random weights"
    if step_of(weights) is not None:
        return f"from the weights of `{weights.parents[1].name}`, checkpoint `{weights.name}`"
    return f"from the weights of `{weights.name}`"


def _training(config: RunConfig, checkpoint: Path, state: dict[str, Any]) -> list[str]:
    """What is known of the training."""
    t, o = config.training, config.optimizer
    lines = [
        f"run `{config.name}`, checkpoint `{checkpoint.name}`",
        f"stage `{config.stage}`, {_origin(config)}",
    ]
    if {"step", "tokens"} <= state.keys():
        lines.append(f"{state['step']:,} of {t.steps:,} steps, {state['tokens']:,} tokens")
    return [
        *lines,
        f"sequences of {t.sequence_length:,} tokens, {t.global_batch_size:,} per step "
        f"({t.global_batch_size * t.sequence_length:,} tokens), precision {t.precision}",
        f"{_updated_by(o)}; {o.schedule.kind} schedule with {o.schedule.warmup_steps:,} warmup "
        "steps",
    ]


def _updated_by(optimizer: OptimizerConfig) -> str:
    """The optimizers and their rates."""
    label, rest = OPTIMIZERS[optimizer.matrices].label, OPTIMIZERS[REST].label
    rate = f"{label} (peak learning rate {getattr(optimizer, optimizer.matrices).learning_rate:g})"
    if optimizer.matrices == REST:
        return rate
    rate_of_rest = getattr(optimizer, REST).learning_rate
    return f"{rate} for matrices and {rest} ({rate_of_rest:g}) for the rest"

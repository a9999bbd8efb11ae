"""A mixture: which datasets, in which shares, filtered and sampled how, for which phase.

The form is that of `configs/data/**`: `metadata`, `datasets`, `validation`. Plain values, as in
`schema.py`; the rules that tie them together are in `mixture_rules.py`. What a mixture becomes,
a blend of indexed datasets, is `schema.DataConfig`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.filters import FilterConfig
from equilibrium_mcore.config.schema import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    setting,
)
from equilibrium_mcore.files.paths import expand_text

Share = Annotated[float, Field(gt=0, le=1)]
Kind = Literal["text", "conversation", "preference", "prompt"]
PHASE_KINDS: dict[str, Kind] = {
    "pretrain": "text",
    "pretrain_phase1": "text",
    "pretrain_phase2": "text",
    "midtrain_phase1": "text",
    "midtrain_phase2": "text",
    "posttrain_sft": "conversation",
    "posttrain_dpo": "preference",
    "posttrain_reward_model": "preference",
    "posttrain_rlaif": "prompt",
    "posttrain_grpo": "prompt",
}
"""What a row becomes in the phases that have a name here; any other phase says its `kind`."""


class MetadataConfig(Section):
    """What the mixture is for."""

    phase: str = setting(doc="the phase of training, by any name; it is shown in reports")
    kind: Kind | None = setting(
        None,
        "what a row becomes: text (tokenized), or a line of JSONL: conversation, preference, "
        "prompt; null: by the phase, if its name is one of " + ", ".join(PHASE_KINDS),
    )
    total_tokens: PositiveInt | None = setting(
        None, "tokens that the phase trains on; each dataset gives mix_ratio of them"
    )
    total_examples: PositiveInt | None = setting(
        None,
        "of other kinds than text: examples in all, each dataset giving mix_ratio; null: all",
    )
    steps: PositiveInt | None = setting(None, "optimizer steps of the phase, for the report")
    description: str = setting("", "what the mixture is meant to do")
    max_seq_length: PositiveInt = setting(4096, "tokens per training sequence, for the report")


class ColumnsConfig(Section):
    """Where a row of a conversation or of a preference holds what."""

    messages: str | None = setting(
        None, "a list of turns, {role, content} or {from, value}; in a text phase joined to text"
    )
    system: str | None = setting(None, "the system prompt, beside the turns")
    prompt: str | None = setting(None, "the prompt, as text or as turns")
    context: str | None = setting(
        None, "text that belongs to the prompt, after a blank line; an empty one is left out"
    )
    response: str | None = setting(None, "sft: the answer to the prompt")
    chosen: str | None = setting(None, "preference: the better answer, transcript or turns")
    rejected: str | None = setting(None, "preference: the worse answer, transcript or turns")
    responses: list[str] = setting([], "preference: the fields of two answers, instead of chosen")
    preferred: str | None = setting(None, "preference: which of responses is better, 0 or 1")
    truth: str | None = setting(
        None, "prompt: what an answer is judged by: a true answer, or tests; any value"
    )
    truth_place: Literal["whole", "boxed", "tag", "hash", "phrase", "last_number"] = setting(
        "whole",
        "where in a text of `truth` the true answer stands: all of it, or as a reward finds an "
        "answer (docs/reference/rewards.md); a row without one is left out and counted",
    )


class SamplingConfig(Section):
    """Which documents are taken when there are more than needed, and in which order."""

    method: Literal["uniform", "weighted", "curriculum"] = setting(
        "uniform",
        "uniform: a random part; weighted: by the quality in `field`; curriculum: from easy to "
        "hard by `field`, in stages",
    )
    temperature: PositiveFloat = setting(
        1.0, "shares become mix_ratio ** (1 / temperature), scaled to sum to 1; above 1 is flatter"
    )
    field: str | None = setting(
        None, "weighted: a number above 0; curriculum: a number; dots reach inside"
    )
    stages: PositiveInt = setting(3, "curriculum: stages of as many tokens each")
    boundaries: list[float] = setting(
        [], "curriculum: values of `field` at which a stage ends, instead of stages of equal size"
    )
    hardest_first: bool = setting(False, "curriculum: from high values of `field` to low")


class DatasetConfig(Section):
    """One dataset of the mixture."""

    name: str = setting(doc="letters, digits, _ . and -: names the files that are written")
    source: Annotated[str, AfterValidator(expand_text)] = setting(
        doc="a local file, folder or pattern (relative to where the tool runs), or the name of a "
        "dataset on the Hugging Face Hub, owner/name"
    )
    mix_ratio: Share = setting(doc="share of the phase's tokens; the shares sum to 1")
    estimated_tokens: PositiveInt | None = setting(
        None, "tokens that the dataset holds, as far as known: checked against max_epochs early"
    )
    format: Literal["jsonl", "parquet", "arrow", "hub"] | None = setting(
        None, "null: by the files' endings; hub: the Hub's library decides"
    )
    text_field: str = setting("text", "the field that holds the text; dots reach inside")
    text_template: str | None = setting(
        None, "several fields as one text, e.g. '{problem}\\n\\n{solution}'; instead of text_field"
    )
    columns: ColumnsConfig = ColumnsConfig()
    splits: list[str] = setting(["train"], "splits to read, of sources that have splits")
    subset: str | None = setting(None, "Hub: the dataset's configuration, e.g. sample-10BT")
    revision: str | None = setting(None, "Hub: branch, tag or commit")
    data_files: str | None = setting(
        None,
        "Hub: a pattern of files, e.g. data/v2/*.json.gz, read by `format`; for a dataset whose "
        "loading script today's `datasets` does not run",
    )
    streaming: bool = setting(
        False, "Hub: read over the network as it comes, without a download of everything first"
    )
    max_epochs: PositiveFloat = setting(
        4.0, "how often a document may be trained on; needing more is an error (arXiv 2305.16264)"
    )
    filters: list[FilterConfig] = setting([], "what is dropped or changed, in this order")
    sampling: SamplingConfig = SamplingConfig()


class ValidationConfig(Section):
    """The part that is held out."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = setting(0.01, "share of every dataset's documents")
    seed: NonNegativeInt = setting(42, "seed of the held-out part, of sampling and of order")


class MixtureConfig(Section):
    """A mixture of datasets for one phase of training."""

    name: str = setting(doc="what the mixture is called; default: its file's place")
    metadata: MetadataConfig
    tokenizer: TokenizerConfig | None = setting(
        None, "the tokenizer of text phases; --tokenizer-type and --tokenizer-model name one too"
    )
    datasets: list[DatasetConfig] = setting(
        doc="the datasets, in the order of deduplication", min_length=1
    )
    allow_repeated_sources: bool = setting(
        False,
        "true: several datasets may read the same files (other fields or filters of them, say); "
        "false: that is refused, whatever they are called",
    )
    validation: ValidationConfig = ValidationConfig()

    @property
    def kind(self) -> Kind:
        """What a row becomes: text to tokenize, or a conversation, preference or prompt."""
        return self.metadata.kind or PHASE_KINDS[self.metadata.phase]

"""What a run reads: the tokenizer, and a blend of indexed datasets."""

from __future__ import annotations

from typing import Literal

from equilibrium_mcore.config.section import (
    PositiveFloat,
    PositiveInt,
    Processes,
    Section,
    SmallInt,
    UserPath,
    setting,
)


class TokenizerConfig(Section):
    """Which tokenizer made the data, and goes with the release."""

    type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = setting(
        doc="Megatron-LM's names: a SentencePiece .model, or a Hugging Face tokenizer.json"
    )
    model: UserPath = setting(
        doc="the .model file, the tokenizer.json, or the folder that holds it"
    )
    end_of_document: str | None = setting(
        None, "the token that ends a document; null: the tokenizer's own end of text"
    )
    space_mark: Literal["kept", "space"] = setting(
        "kept",
        "SentencePiece: U+2581 in a text, with which it writes a space inside. kept: as its bytes, "
        "so that it comes back as itself; space: as the sentencepiece library does, a space",
    )


class SourceConfig(Section):
    """One indexed dataset of the blend."""

    name: str = setting(doc="what logs call it")
    prefix: UserPath = setting(doc="path of the .bin/.idx pair without its ending")
    weight: PositiveFloat = setting(doc="share in the blend; weights are scaled to sum to 1")
    max_epochs: PositiveFloat | None = setting(
        None, "a run that would go through its training documents more often is refused"
    )


class DataConfig(Section):
    """A blend of indexed datasets."""

    type: Literal["indexed"] = setting("indexed", "which kind of data")
    name: str = setting(doc="what the blend is called")
    tokenizer: TokenizerConfig = setting(doc="the tokenizer of the data")
    sources: list[SourceConfig] = setting(doc="the datasets", min_length=1)
    split: str = setting(
        "98,1,1", "shares of documents for train, validation and test, e.g. 98,1,1"
    )
    allow_repeated_sources: bool = setting(
        False,
        "true: several sources may hold the same data, which then counts once for each; false: "
        "that is refused, whatever they are called",
    )
    order: Literal["ledger", "megatron"] = setting(
        "ledger",
        "who decides which document comes next: ledger keeps a cursor per source; megatron takes "
        "megatron-core's order for a given number of sequences",
    )
    packing: Literal["stream", "documents"] = setting(
        "stream",
        "stream: a document sees what stands before it in its sequence; documents: attention, "
        "Mamba's state and positions start again at each, and no label belongs to the next one",
    )
    document_multiple: PositiveInt = setting(
        1,
        "packing documents: each is padded to a multiple of so many tokens, which do not count in "
        "the loss; context parallelism needs a multiple of 2 * parallelism.context",
    )
    train_samples: PositiveInt | None = setting(
        None,
        "order megatron: sequences that the order of the data is made for; null: training.steps * "
        "training.global_batch_size. Set it higher at the start of a run that may be prolonged",
    )
    cache_directory: UserPath | None = setting(
        None, "order megatron: where index caches go; null: beside the data"
    )
    num_workers: Processes = setting(0, "loader processes per rank")
    prefetch_factor: SmallInt = setting(2, "micro-batches that each loader process has ready")

    @property
    def padding_multiple(self) -> int:
        """What documents are padded to in a sequence; 1 where they follow each other as one."""
        return self.document_multiple if self.packing == "documents" else 1

"""From the settings of conversations to datasets, with what was left out and how well they pack."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from equilibrium_mcore.config.chat import ConversationsConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.dataset import ConversationDataset
from equilibrium_mcore.data.chat.encode import EncodingReport
from equilibrium_mcore.data.chat.epochs import PackedEpoch, count_sequences, packed_epoch
from equilibrium_mcore.data.chat.order import Packing
from equilibrium_mcore.data.chat.render import build_renderer
from equilibrium_mcore.data.chat.store import load_or_encode
from equilibrium_mcore.data.tokenizer import load_tokenizer


class BuiltConversations(NamedTuple):
    """A dataset, and for the log: what became of the conversations, and of an epoch of them."""

    dataset: ConversationDataset
    report: EncodingReport
    epoch: PackedEpoch

    def __str__(self) -> str:
        return f"{self.report}\n{self.epoch}"


def build_conversations(
    config: ConversationsConfig,
    *,
    part: Literal["train", "validation"] = "train",
    sequence_length: int,
    seed: int,
    vocab_size: int,
    samples: int | None = None,
    state: dict[str, Any] | None = None,
    first_sample: int = 0,
) -> BuiltConversations:
    """The part's dataset.

    Args:
        samples: sequences that the run takes in all; None: those of `config.epochs`.
        state: what an order's `state()` gave at sample `first_sample`.

    Raises ConfigError for settings, files and states that cannot be used, and FileNotFoundError or
    ValueError for a tokenizer that cannot be read.
    """
    renderer = build_renderer(config.template, load_tokenizer(config.tokenizer))
    longest = min(config.max_tokens or sequence_length, sequence_length)
    if config.max_tokens is not None and config.max_tokens > sequence_length:
        raise ConfigError(
            f"max_tokens={config.max_tokens:,} is more than training.sequence_length="
            f"{sequence_length:,}: an example lies in one sequence; lower it, or leave it out"
        )
    examples, report = load_or_encode(config, renderer, part=part, max_tokens=longest)
    plan = {
        "seed": seed,
        "window": config.window,
        "packing": Packing(sequence_length, config.document_multiple),
    }
    if samples is None:
        samples = count_sequences(examples, epochs=config.epochs or 1, **plan)
    tokenizer = renderer.vocabulary.tokenizer
    dataset = ConversationDataset(
        examples,
        sequence_length=sequence_length,
        samples=samples,
        seed=seed,
        vocab_size=vocab_size,
        pad_id=tokenizer.eod if tokenizer.pad_id is None else tokenizer.pad_id,
        window=config.window,
        document_multiple=config.document_multiple,
        state=state,
        first_sample=first_sample,
    )
    return BuiltConversations(dataset, report, packed_epoch(examples, **plan))

"""From the settings of conversations to datasets, with what was left out and how well they pack."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from equilibrium_mcore.config.chat import ConversationsConfig, PreferencesConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.dataset import ConversationDataset
from equilibrium_mcore.data.chat.encode import EncodingReport
from equilibrium_mcore.data.chat.epochs import PackedEpoch, count_sequences, packed_epoch
from equilibrium_mcore.data.chat.examples import Examples
from equilibrium_mcore.data.chat.order import Packing
from equilibrium_mcore.data.chat.preferences import PreferenceDataset, pair_units
from equilibrium_mcore.data.chat.render import Renderer, build_renderer
from equilibrium_mcore.data.chat.store import load_or_encode
from equilibrium_mcore.data.chat.unpaired import UnpairedDataset, unpaired_units
from equilibrium_mcore.data.repeats import same_text
from equilibrium_mcore.data.tokenizer import load_tokenizer

Part = Literal["train", "validation"]


class BuiltConversations(NamedTuple):
    """A dataset, and for the log: what became of the conversations, and of an epoch of them."""

    dataset: ConversationDataset
    report: EncodingReport
    epoch: PackedEpoch

    def __str__(self) -> str:
        return f"{self.report}\n{self.epoch}"


class EpochSequences(NamedTuple):
    """How many sequences some epochs make, and what one is."""

    sequences: int
    epoch: PackedEpoch


def build_conversations(
    config: ConversationsConfig,
    *,
    part: Part = "train",
    sequence_length: int,
    seed: int,
    vocab_size: int,
    samples: int,
    state: dict[str, Any] | None = None,
    first_sample: int = 0,
) -> BuiltConversations:
    """The part's dataset.

    Args:
        samples: sequences that the run takes in all.
        state: what an order's `state()` gave at sample `first_sample`.

    Raises ConfigError for settings, files and states that cannot be used, and FileNotFoundError or
    ValueError for a tokenizer that cannot be read.
    """
    renderer, examples, report = _examples(config, part, sequence_length)
    tokenizer = renderer.vocabulary.tokenizer
    dataset = _kind(config)(
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
    epoch = packed_epoch(
        examples,
        dataset.units(examples),
        every=_every(config),
        **_plan(config, sequence_length, seed),
    )
    return BuiltConversations(dataset, report, epoch)


def epoch_sequences(
    config: ConversationsConfig, *, epochs: float, sequence_length: int, seed: int
) -> EpochSequences:
    """Sequences that the training part's first `epochs` epochs make. Raises as above."""
    _, examples, _ = _examples(config, "train", sequence_length)
    plan = _plan(config, sequence_length, seed)
    units = examples.lengths
    if isinstance(config, PreferencesConfig):
        measure = unpaired_units if config.unpaired else pair_units
        units = measure(examples, config.document_multiple)
    return EpochSequences(
        count_sequences(units, epochs=epochs, **plan),
        packed_epoch(examples, units, every=_every(config), **plan),
    )


def _kind(config: ConversationsConfig) -> type[ConversationDataset]:
    if not isinstance(config, PreferencesConfig):
        return ConversationDataset
    return UnpairedDataset if config.unpaired else PreferenceDataset


def _every(config: ConversationsConfig) -> int:
    """Beside each of unpaired answers stands a mismatched one, which is not trained on."""
    return 2 if isinstance(config, PreferencesConfig) and config.unpaired else 1


def _examples(
    config: ConversationsConfig, part: Part, sequence_length: int
) -> tuple[Renderer, Examples, EncodingReport]:
    renderer = build_renderer(config.template, load_tokenizer(config.tokenizer))
    longest = min(config.max_tokens or sequence_length, sequence_length)
    if config.max_tokens is not None and config.max_tokens > sequence_length:
        raise ConfigError(
            f"max_tokens={config.max_tokens:,} is more than training.sequence_length="
            f"{sequence_length:,}: an example lies in one sequence; lower it, or leave it out"
        )
    if not config.allow_repeated_sources:
        _refuse_repeats(config, part)
    examples, report = load_or_encode(config, renderer, part=part, max_tokens=longest)
    return renderer, examples, report


def _refuse_repeats(config: ConversationsConfig, part: Part) -> None:
    files = [(source.name, path) for source in config.sources for path in getattr(source, part)]
    if pairs := same_text((name, path) for name, path in files if path.is_file()):
        raise ConfigError(
            f"{part}: {'; '.join(pairs[:5])} hold the same conversations: name each file once, or "
            "say that it is meant with data.allow_repeated_sources=true",
            source=f"data {config.name!r}",
        )


def _plan(config: ConversationsConfig, sequence_length: int, seed: int) -> dict[str, Any]:
    packing = Packing(sequence_length, config.document_multiple)
    return {"seed": seed, "window": config.window, "packing": packing}

"""Conversations, pairs and prompts: files, chat template, what happens to long ones, packing.

Plain values, as in `schema.py`. What they become is in `data/chat/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.section import (
    PositiveInt,
    Processes,
    Section,
    SmallInt,
    UserPath,
    setting,
)


class JinjaTemplateConfig(Section):
    """A chat template of your own, as `tokenizer.apply_chat_template` takes it."""

    jinja: UserPath = setting(
        doc="the Jinja file; {% generation %} marks what the assistant produces"
    )


BUILT_IN = ("chatml", "llama3", "plain")


def _known_template(value: object) -> object:
    # One message for both kinds, where the union would give one for each.
    own = isinstance(value, JinjaTemplateConfig) or (
        isinstance(value, dict) and set(value) == {"jinja"} and isinstance(value["jinja"], str)
    )
    if value in BUILT_IN or own:
        return value
    raise ValueError(f"{value!r} is none of {', '.join(BUILT_IN)} and no {{jinja: FILE}}")


TemplateChoice = Annotated[
    Literal["chatml", "llama3", "plain"] | JinjaTemplateConfig, BeforeValidator(_known_template)
]


def template_named(text: str) -> TemplateChoice:
    """A built-in template by its name; every other text is the path of a Jinja file."""
    return text if text in BUILT_IN else JinjaTemplateConfig(jinja=Path(text))


class ConversationSourceConfig(Section):
    """One set of conversations."""

    name: str = setting(doc="what logs and error messages call it")
    train: list[UserPath] = setting(
        doc="JSONL files, plain, .gz or .zst; tools/prepare_dataset.py writes NAME.train.jsonl",
        min_length=1,
    )
    validation: list[UserPath] = setting(
        [], "JSONL files to validate on, e.g. NAME.validation.jsonl"
    )


class ChatsConfig(Section):
    """What all data that a chat template renders has."""

    type: str = setting(doc="which kind of data")
    name: str = setting(doc="what the data is called")
    tokenizer: TokenizerConfig = setting(doc="the tokenizer of the model")
    sources: list[ConversationSourceConfig] = setting(doc="the sets", min_length=1)
    allow_repeated_sources: bool = setting(
        False,
        "true: several sources may hold the same data, which then counts once for each; false: "
        "that is refused, whatever they are called",
    )
    template: TemplateChoice = setting(
        "chatml", "chat template: a built-in one, or {jinja: FILE} for your own"
    )
    max_tokens: PositiveInt | None = setting(
        None, "longest example; null: as long as a sequence (training.sequence_length)"
    )
    too_long: str = setting("refuse", "what is done about longer ones")
    document_multiple: PositiveInt = setting(
        1,
        "each document is padded to a multiple of so many tokens, which do not count in the loss; "
        "context parallelism needs a multiple of 2 * parallelism.context",
    )

    packing: ClassVar[str] = "documents"  # each example is one; see DataConfig.packing


class ConversationsConfig(ChatsConfig):
    """Conversations for supervised fine-tuning."""

    type: Literal["conversations"] = setting("conversations", "which kind of data")
    too_long: Literal["refuse", "cut", "drop"] = setting(
        "refuse",
        "longer examples: refuse the data; cut after the last answer that fits; drop them. What "
        "was cut and dropped is counted",
    )
    window: PositiveInt = setting(
        1024, "examples that are packed together; more waste fewer tokens, and are less shuffled"
    )
    cache_directory: UserPath | None = setting(
        None,
        "where encoded examples are kept for all ranks and the next start; null: conversations/ in "
        "the run's output_directory",
    )
    num_workers: Processes = setting(0, "loader processes per rank")
    prefetch_factor: SmallInt = setting(2, "micro-batches that each loader process has ready")


class PreferencesConfig(ConversationsConfig):
    """Pairs of a chosen and a rejected answer to one prompt; or single answers, judged."""

    type: Literal["preferences"] = setting("preferences", "which kind of data")
    unpaired: bool = setting(
        False,
        "answers by themselves, each desirable or not, for objective kto; a row of a pair gives "
        "two of them",
    )
    too_long: Literal["refuse", "drop"] = setting(
        "refuse",
        "pairs of more tokens, both answers with their prompt together: refuse the data, or drop "
        "them, counted",
    )


class PromptsConfig(ChatsConfig):
    """Prompts that a policy answers, each with what an answer is judged by."""

    type: Literal["prompts"] = setting("prompts", "which kind of data")
    truth: str | None = setting(
        "truth",
        "the key of a row that holds the true answer, or the tests; `prompt` or `messages` holds "
        "the prompt; null: rows have none, and answers are judged without (stage rlaif)",
        min_length=1,
    )
    max_tokens: PositiveInt | None = setting(
        None,
        "longest prompt; null: what leaves room for rollout.max_new_tokens in a sequence "
        "(training.sequence_length)",
    )
    too_long: Literal["refuse", "drop"] = setting(
        "refuse", "longer prompts: refuse the data, or drop them, counted"
    )

    num_workers: ClassVar[int] = 0  # prompts are in memory
    prefetch_factor: ClassVar[int] = 2


def parse_conversations(values: object, *, source: object = None) -> ConversationsConfig:
    """`values`, plain ones, as settings. Raises ConfigError with every problem."""
    parsed = parse(ConversationsConfig, values)
    if isinstance(parsed, ConversationsConfig):
        return parsed
    raise ConfigError([problem.text for problem in parsed], source=source)

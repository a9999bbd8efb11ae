"""A run's datasets: a row for each kind of data that the config may name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from equilibrium_mcore.config import rules
from equilibrium_mcore.config.chat import ConversationsConfig, PreferencesConfig, PromptsConfig
from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.layout import train_samples
from equilibrium_mcore.config.objectives import PREFERENCES
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.blend import Datasets, build_datasets, epoch_tokens
from equilibrium_mcore.data.chat.answers import AnswerDataset
from equilibrium_mcore.data.chat.build import build_conversations, epoch_sequences
from equilibrium_mcore.data.chat.prompts import PromptSamples, build_prompts
from equilibrium_mcore.data.ledger.dataset import LedgerDataset
from equilibrium_mcore.data.left_out import LeftOut, RemainingSamples
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.data.sources import SPLITS, check_sources
from equilibrium_mcore.data.tokenizer import load_tokenizer

CONVERSATIONS_FOLDER = "conversations"  # in the output directory: what was encoded

Progress = dict[str, Any]
Say = Callable[[str], object]


def documents_at(train: Samples, first: int, count: int) -> list[str]:
    """Names of the documents that samples are made of, by position; those that are known."""
    dataset = train.dataset if isinstance(train, RemainingSamples) else train
    if not isinstance(dataset, LedgerDataset):
        return []
    plans = [dataset.plan_of(position) for position in range(first, first + count)]
    names = (
        f"{dataset.sources[plan.source].name}:{span.document}"
        for plan in plans
        for span in plan.spans
    )
    return list(dict.fromkeys(names))


class DataKind(NamedTuple):
    """What a kind of data gives a run.

    `build` makes its datasets, continuing at a checkpoint's progress; `count` gives the sequences
    of so many epochs, and how they were counted. `has_baseline`: n-grams of the training split can
    be counted beside the loss; of conversations only a part counts.
    """

    build: Callable[[RunConfig, Progress | None, Say], Datasets]
    count: Callable[[RunConfig, float], tuple[int, str]]
    has_baseline: bool


def build_run_datasets(
    config: RunConfig, progress: Progress | None = None, *, say: Say = lambda text: None
) -> Datasets:
    """The datasets with as many samples as the whole run takes.

    They continue where `progress`, the `state.json` of a checkpoint, left them; None is a run from
    scratch. `say` gets what is worth a line in the log. Raises ConfigError for data that cannot be
    trained on.
    """
    build, left_out = _built_by(config), left_out_of(config, progress)
    if not left_out:
        return build(config, progress, say)
    samples = _samples_to_come(config, progress or {"step": 0, "samples": 0})
    if progress is not None:  # the data counts positions
        progress = {**progress, "samples": left_out.passed(progress["samples"])}
    built = build(config, progress, say)
    return replace(built, train=RemainingSamples(built.train, left_out, samples=samples))


def _built_by(config: RunConfig) -> Callable[[RunConfig, Progress | None, Say], Datasets]:
    """The builder of the config's kind of data, whose errors are those of settings."""

    def build(config: RunConfig, progress: Progress | None, say: Say) -> Datasets:
        with _told_of_data(config):
            return DATA_KINDS[type(config.data)].build(config, progress, say)

    return build


@contextlib.contextmanager
def _told_of_data(config: RunConfig) -> Iterator[None]:
    """Files that cannot be read are told as settings that name the wrong ones are."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error), source=f"data {config.data.name!r}") from error


def check_run_data(config: RunConfig) -> None:
    """Check indexed datasets as `build_run_datasets` does at first, and write nothing.

    Raises ConfigError.
    """
    needed = (train_samples(config), _validation_samples(config), 0)
    with _told_of_data(config):
        check_sources(
            config.data,
            tokenizer=load_tokenizer(config.data.tokenizer),
            model_vocab_size=config.model.vocab_size,
            needed=dict(zip(SPLITS, needed, strict=True)),
        )


def left_out_of(config: RunConfig, progress: Progress | None) -> LeftOut:
    """What the checkpoint of `progress` left out, and what the config does.

    Raises ConfigError for a range of the config in what was trained on already.
    """
    saved = LeftOut((progress or {}).get("left_out", ()))
    both = saved + config.training.left_out
    samples = (progress or {}).get("samples", 0)
    if both.passed(samples) != saved.passed(samples):
        raise ConfigError(
            f"training.left_out={[list(pair) for pair in config.training.left_out]}: the run has "
            f"trained on {samples:,} samples, up to position {saved.passed(samples):,}, and none "
            "of them can be left out any more: name later ones, or start from an earlier "
            "checkpoint (checkpoint.resume_step)"
        )
    return both


def with_steps(config: RunConfig, *, say: Say = lambda text: None) -> RunConfig:
    """The run with `training.epochs` as steps: reads the data, and says the arithmetic.

    A run that has steps stays as it is. Raises ConfigError for data that cannot be read, and for
    settings that do not fit the steps.
    """
    training = config.training
    if training.steps is not None:
        return config
    with _told_of_data(config):
        sequences, counted = DATA_KINDS[type(config.data)].count(config, training.epochs)
    steps = math.ceil(sequences / training.global_batch_size)
    say(
        f"training.epochs={training.epochs:g}: {counted}; {sequences:,} sequences / "
        f"training.global_batch_size={training.global_batch_size:,} = {steps:,} steps"
    )
    fixed = training.model_copy(update={"steps": steps, "epochs": None})
    config = config.model_copy(update={"training": fixed})
    problems = rules.check(config)
    if problems:
        raise ConfigError(problems, source=f"training.epochs={training.epochs:g}: {steps:,} steps")
    return config


# ------------------------------------------------------------------------------- indexed datasets


def _indexed(config: RunConfig, progress: Progress | None, say: Say) -> Datasets:
    training = config.training
    saved = _ledger_progress(config, progress)
    samples = train_samples(config)
    if config.data.order == "ledger":
        samples = _samples_to_come(config, saved)
    return build_datasets(
        config.data,
        sequence_length=training.sequence_length,
        train_samples=samples,
        validation_samples=_validation_samples(config),
        seed=training.seed,
        tokenizer=load_tokenizer(config.data.tokenizer),
        model_vocab_size=config.model.vocab_size,
        ledger_state=saved["ledger"],
        consumed_samples=saved["samples"],
    )


def _ledger_progress(config: RunConfig, progress: Progress | None) -> Progress:
    """Step, samples and ledger at which the data starts."""
    if progress is None or config.data.order != "ledger":
        return {"step": 0, "samples": 0, "ledger": None}
    if progress.get("ledger") is None:
        raise ConfigError(
            f"data.order='ledger', but the checkpoint of step {progress['step']} in "
            f"{config.output_directory} holds no ledger: it was trained in another order, in "
            "which the documents that it has seen cannot be named. Set data.order=megatron to go "
            "on, or start a new run in another output_directory with "
            f"checkpoint.initial_weights={config.output_directory}"
        )
    return progress


def _indexed_epochs(config: RunConfig, epochs: float) -> tuple[int, str]:
    """The weights of the blend decide how the tokens are shared, not how many they are."""
    tokens = epoch_tokens(config.data)
    length = config.training.sequence_length
    sequences = math.ceil(epochs * tokens / length)
    return sequences, (
        f"{epochs:g} x {tokens:,} training tokens of {len(config.data.sources):,} sources / "
        f"training.sequence_length={length:,}"
    )


# ---------------------------------------------------------------------------------- conversations


def _conversations(config: RunConfig, progress: Progress | None, say: Say) -> Datasets:
    saved = progress or {"step": 0, "samples": 0, "conversations": None}
    if saved.get("conversations") is None and progress is not None:
        raise ConfigError(
            f"the checkpoint of step {saved['step']} in {config.output_directory} says nothing of "
            "conversations: it was trained on other data. Start a new run in another "
            f"output_directory with checkpoint.initial_weights={config.output_directory}"
        )
    training, data = config.training, cached_conversations(config)
    settings = {
        "sequence_length": training.sequence_length,
        "seed": training.seed,
        "vocab_size": config.model.vocab_size,
    }
    built = build_conversations(
        data,
        samples=_samples_to_come(config, saved),
        state=saved["conversations"],
        first_sample=saved["samples"],
        **settings,
    )
    say(str(built))
    validation, count = None, _validation_samples(config)
    if count:
        held_out = build_conversations(data, part="validation", samples=count, **settings)
        say(f"validation: {held_out.epoch}")
        validation = held_out.dataset
        if isinstance(validation, AnswerDataset):
            validation.first_place = len(built.dataset.examples.ids)
    return Datasets(train=built.dataset, validation=validation, test=None)


def _conversation_epochs(config: RunConfig, epochs: float) -> tuple[int, str]:
    counted = epoch_sequences(
        cached_conversations(config),
        epochs=epochs,
        sequence_length=config.training.sequence_length,
        seed=config.training.seed,
    )
    return counted.sequences, f"{epochs:g} x {counted.epoch}"


def cached_conversations(config: RunConfig) -> ConversationsConfig:
    """The data's settings with a place for what was encoded."""
    if config.data.cache_directory is not None:
        return config.data
    folder = config.output_directory / CONVERSATIONS_FOLDER
    return config.data.model_copy(update={"cache_directory": folder})


# ---------------------------------------------------------------------------------------- prompts


def _prompts(config: RunConfig, progress: Progress | None, say: Say) -> Datasets:
    """Prompts have no validation by loss: `EvaluationConfig` asks for the held-out ones."""
    evaluates = config.evaluation.interval_steps > 0
    held_out = _prompts_of(config, "validation", say) if evaluates else None
    return Datasets(train=_prompts_of(config, "train", say), validation=held_out, test=None)


def _prompts_of(config: RunConfig, part: Literal["train", "validation"], say: Say) -> PromptSamples:
    samples, report = build_prompts(
        config.data,
        part=part,
        longest=longest_prompt(config),
        vocab_size=config.model.vocab_size,
        seed=config.training.seed,
    )
    say(f"{part}: {report}")
    return samples


def longest_prompt(config: RunConfig) -> int:
    """Tokens of a prompt that leave room for an answer in a sequence; for two of them with the
    prompt each, where pairs are learned from."""
    room, multiple = config.training.sequence_length, config.data.document_multiple
    if isinstance(config.objective, PREFERENCES):
        room = room // 2 // multiple * multiple
    return room - config.rollout.max_new_tokens


def _prompt_epochs(config: RunConfig, epochs: float) -> tuple[int, str]:
    """Sequences of a run on prompts are answers, each as often as it is trained on."""
    prompts, rollout = len(_prompts_of(config, "train", lambda text: None)), config.rollout
    answers = math.ceil(epochs * prompts) * rollout.samples_per_prompt * rollout.passes
    return answers, (
        f"{epochs:g} x {prompts:,} prompts x {rollout.samples_per_prompt:,} answers x "
        f"{rollout.passes} passes"
    )


# ------------------------------------------------------------------------------------------- both


def _samples_to_come(config: RunConfig, saved: Progress) -> int:
    """Steps that are done may have had another batch than those to come."""
    to_come = max(0, config.training.steps - saved["step"])
    return saved["samples"] + to_come * config.training.global_batch_size


def _validation_samples(config: RunConfig) -> int:
    training = config.training
    validates = training.validation_interval_steps > 0
    return training.validation_batches * training.global_batch_size * validates


DATA_KINDS: dict[type, DataKind] = {
    DataConfig: DataKind(_indexed, _indexed_epochs, has_baseline=True),
    ConversationsConfig: DataKind(_conversations, _conversation_epochs, has_baseline=False),
    PreferencesConfig: DataKind(_conversations, _conversation_epochs, has_baseline=False),
    PromptsConfig: DataKind(_prompts, _prompt_epochs, has_baseline=False),
}

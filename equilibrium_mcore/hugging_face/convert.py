"""Turns a distributed checkpoint into a folder that Hugging Face transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from equilibrium_mcore.checkpoint.directory import (
    CONFIG_FILE,
    STATE_FILE,
    read_state,
)
from equilibrium_mcore.checkpoint.opened import open_weights
from equilibrium_mcore.config.chat import ChatsConfig, TemplateChoice
from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.heads import has_output
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.chat.render import Renderer, build_renderer
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from equilibrium_mcore.files.paths import real_path
from equilibrium_mcore.files.replace import mark_folder, writable_folder
from equilibrium_mcore.files.whole import whole_folder, write_whole
from equilibrium_mcore.hugging_face.adapter_files import write_adapters
from equilibrium_mcore.hugging_face.chat_files import TEMPLATE_FILE
from equilibrium_mcore.hugging_face.config_json import architecture_values, config_values
from equilibrium_mcore.hugging_face.mapping import plan
from equilibrium_mcore.hugging_face.merged import Merged, WithoutAdapters
from equilibrium_mcore.hugging_face.model_card import model_card
from equilibrium_mcore.hugging_face.reader import CheckpointReader
from equilibrium_mcore.hugging_face.source import TensorSource
from equilibrium_mcore.hugging_face.tokenizer_files import write_tokenizer
from equilibrium_mcore.hugging_face.weights import (
    DEFAULT_SHARD_BYTES,
    Progress,
    WeightsReport,
    write_weights,
)

MODELLING_CODE = Path(__file__).parent / "model_code"
ADAPTERS_FOLDER = "adapters"
MODELLING_FILES = ("configuration_equilibrium.py", "modeling_equilibrium.py")


@dataclass(frozen=True)
class ExportReport:
    """What was written: where, of which checkpoint, how much.

    `notes`: what differs from the files of the tokenizer, so that it gives training's ids.
    """

    directory: Path
    checkpoint: Path
    weights: WeightsReport
    notes: tuple[str, ...] = ()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder at `path`, or the latest of the run whose output directory it is.

    All its files are verified. Raises FileNotFoundError, and DamagedCheckpointError.
    """
    return open_weights(path).path


def read_run_config(checkpoint: Path) -> RunConfig:
    """The effective config that was saved with the checkpoint."""
    path = checkpoint / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the checkpoint's run config is needed")
    return load_run(path)


def export_hugging_face(
    checkpoint: Path,
    output_directory: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    main_weights: bool = False,
    adapters: Literal["merge", "apart", "leave_out"] = "merge",
    tokenizer: TokenizerConfig | None = None,
    chat_template: TemplateChoice | Literal["of_the_run", "none"] = "of_the_run",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the model of `checkpoint` to `output_directory`; memory is that of one shard.

    Args:
        checkpoint: a checkpoint folder, or a run's output directory (its latest is taken).
        dtype: of the weights; `A_log`, `D`, `dt_bias` and expert biases stay float32.
        main_weights: take the optimizer's float32 copies of weights that train in bfloat16.
        adapters: of a run that trained some: add them to the weights, leave them out, or write them
            apart beside weights without them, into `adapters/`, as peft loads them.
        tokenizer: instead of the one that the run's config names.
        chat_template: `of_the_run` is that of conversations it was trained on, and else none.
        max_shard_bytes: a .safetensors file holds at most this much, or one tensor.
        overwrite: replace a folder that an earlier export wrote.
        progress: called with (tensors written, tensors in all).

    Everything is written to a temporary folder and renamed at the end. Raises FileNotFoundError for
    what is not there, FileExistsError for an output that must not be replaced (`files/replace.py`),
    ValueError where checkpoint and config do not fit, and ConfigError for a chat template that the
    tokenizer cannot write.
    """
    sources = [checkpoint, checkpoint := find_checkpoint(checkpoint)]

    def check() -> Path:
        if real_path(output_directory).is_relative_to(real_path(checkpoint)):
            raise FileExistsError(
                f"--output {output_directory} lies in the checkpoint {checkpoint}: choose another"
            )
        return writable_folder(output_directory, sources=sources, overwrite=overwrite)

    target = check()
    config = read_run_config(checkpoint)
    reader = CheckpointReader(checkpoint, main_weights=main_weights)
    source = source_of(reader, config, merge=adapters == "merge")
    architecture_values(config.model)  # both raise before a folder is begun
    plan(config.model, source.names())
    loaded = _load_tokenizer(config, tokenizer)
    renderer = _renderer(config, loaded, chat_template)
    notes: list[str] = []
    with whole_folder(target, check=check) as folder:
        weights = write_model(
            folder,
            source=source,
            config=config,
            dtype=dtype,
            tokenizer=loaded,
            renderer=renderer,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
            say=notes.append,
        )
        if config.adapters is not None and adapters == "apart":
            (folder / ADAPTERS_FOLDER).mkdir()
            write_adapters(
                folder / ADAPTERS_FOLDER,
                source=source,
                settings=config.adapters,
                model=config.model,
                dtype=dtype,
                base=str(target),
            )
        _write_card(folder, config, checkpoint, weights)
        mark_folder(folder)
    return ExportReport(output_directory, checkpoint, weights, tuple(notes))


def source_of(source: TensorSource, config: RunConfig, *, merge: bool = True) -> TensorSource:
    """The tensors that Hugging Face's model has: with adapters added to their weights, or not."""
    if config.adapters is None:
        return source
    if merge:
        return Merged(source, config.adapters, config.model)
    return WithoutAdapters(source)


def write_model(
    folder: Path,
    *,
    source: TensorSource,
    config: RunConfig,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    tokenizer: Tokenizer | None = None,
    renderer: Renderer | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> WeightsReport:
    """Everything that transformers loads, into a folder that is there: code, settings, weights.

    Args:
        source: the model's tensors, of a checkpoint or of a run in memory (`LiveTensors`).
        config: of the run that the model is of.
        tokenizer: the one that the run's config names if not given.
        renderer: of its chat template, if it gets one.
        say: told what differs from the tokenizer's own files.

    See `export_hugging_face` for the others. Raises ValueError where source, tokenizer and config
    do not fit.
    """
    if not isinstance(source, WithoutAdapters):
        source = source_of(source, config)
    rows = plan(config.model, source.names())
    tokenizer = tokenizer or _load_tokenizer(config)
    values = _write_settings(folder, config, tokenizer, dtype)
    for note in write_tokenizer(tokenizer, folder, renderer=renderer):
        say(note)
    return write_weights(
        folder,
        source=source,
        rows=rows,
        model=config.model,
        hugging_face_config=values,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


# --------------------------------------------------------------------------------- the inside


def _load_tokenizer(config: RunConfig, settings: TokenizerConfig | None = None) -> Tokenizer:
    tokenizer = load_tokenizer(settings or config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens and the model "
            f"vocab_size={config.model.vocab_size}: it is not the tokenizer of the training data"
        )
    return tokenizer


def _renderer(
    config: RunConfig, tokenizer: Tokenizer, choice: TemplateChoice | Literal["of_the_run", "none"]
) -> Renderer | None:
    if choice == "of_the_run":
        choice = config.data.template if isinstance(config.data, ChatsConfig) else "none"
    return None if choice == "none" else build_renderer(choice, tokenizer)


def _write_settings(
    folder: Path, config: RunConfig, tokenizer: Tokenizer, dtype: str
) -> dict[str, Any]:
    """Write the modelling code, config.json and generation_config.json; the config's values."""
    from transformers import __version__

    for name in MODELLING_FILES:
        shutil.copyfile(MODELLING_CODE / name, folder / name)
    tokens = {
        # In the training stream every document stands after an end of document.
        "bos_token_id": tokenizer.eod if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod if tokenizer.pad_id is None else tokenizer.pad_id,
    }
    values = {
        "model_type": "equilibrium",
        **architecture_values(config.model),
        **config_values(config.model, sequence_length=config.training.sequence_length),
        **tokens,
        "dtype": dtype,
        "transformers_version": __version__,
    }
    _write_json(folder / "config.json", values)
    if has_output(config.model):
        settings = {**tokens, "transformers_version": __version__}
        _write_json(folder / "generation_config.json", settings)
    return values


def _write_card(folder: Path, config: RunConfig, checkpoint: Path, weights: WeightsReport) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    state = read_state(checkpoint) if (checkpoint / STATE_FILE).is_file() else {}
    card = model_card(
        config,
        checkpoint=checkpoint,
        state=state,
        dtype=weights.dtype,
        total_parameters=weights.parameters,
        active_parameters=weights.active_parameters,
        splits_special_tokens=bool(settings.get("split_special_tokens", False)),
        chat=(folder / TEMPLATE_FILE).is_file(),
    )
    write_whole(folder / "README.md", card)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

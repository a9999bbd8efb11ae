"""What an export will make of a run's tokenizer, told before the run and not after it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from equilibrium_mcore.config.chat import ChatsConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.chat.render import build_renderer
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.hugging_face.tokenizer_files import write_tokenizer


def tokenizer_notes(config: RunConfig) -> list[str]:
    """What an export changes beside the tokenizer, or why it would refuse it; it is tried.

    A tokenizer that is not on this host is a note, too: a run for a cluster may be checked
    elsewhere.
    """
    data = config.data
    # transformers says at length what the notes say in a line.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        tokenizer = load_tokenizer(data.tokenizer)
        chats = isinstance(data, ChatsConfig)
        renderer = build_renderer(data.template, tokenizer) if chats else None
        with tempfile.TemporaryDirectory() as folder:
            return write_tokenizer(tokenizer, Path(folder), renderer=renderer)
    except FileNotFoundError as error:
        return [f"not compared with its export: {error}"]
    except (ValueError, OSError, ConfigError) as error:
        return [f"it trains, but an export will be refused: {error}"]


def print_tokenizer_notes(config: RunConfig, stream) -> None:
    """The notes as lines of a stream."""
    for note in tokenizer_notes(config):
        print(f"tokenizer {config.data.tokenizer.model}: {note}", file=stream)

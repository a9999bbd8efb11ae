"""Add control tokens to a copy of a tokenizer: those that a chat template needs, or your own.

Examples:
    {prog} data/tokenizer.model --output data/chat.model \\
        --tokens '<|im_start|>' '<|im_end|>'
    {prog} data/llama --output data/llama_chat --template llama3

The tokenizer is a SentencePiece .model, a Hugging Face tokenizer.json, or the folder of one. Old
ids stay; new tokens get the next ones. A run grows a model that was trained before: set its
checkpoint.initial_weights, and model.vocab_size to the size that is printed here. Rows of new
tokens start at the mean of the old ones: docs/guides/fine_tuning.md.
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.data.chat.templates import TEMPLATES
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tokenizer, where the copy goes, and which tokens."""
    add = parser.add_argument
    add("tokenizer", type=user_path, help=".model, tokenizer.json, or the folder that holds it")
    add("--output", type=user_path, required=True, help="a new .model file; a new folder otherwise")
    add("--overwrite", action="store_true", help="replace an --output that exists")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--tokens", nargs="+", metavar="TOKEN", help="control tokens to add")
    asked.add_argument("--template", choices=TEMPLATES, help="those of a built-in chat template")


def run(options: argparse.Namespace) -> None:
    """Write the tokenizer, print the ids."""
    from equilibrium_mcore.config.data import TokenizerConfig
    from equilibrium_mcore.corpus.special_tokens import add_special_tokens

    tokens = options.tokens or [t for t in TEMPLATES[options.template].controls if t is not None]
    kind = "SentencePieceTokenizer"
    if options.tokenizer.suffix == ".json" or (options.tokenizer / "tokenizer.json").is_file():
        kind = "HuggingFaceTokenizer"
    config = TokenizerConfig(type=kind, model=options.tokenizer)
    added = add_special_tokens(config, tokens, options.output, overwrite=options.overwrite)
    for token, (old, new) in added.ids.items():
        print(f"{new:>8}  {token}{'' if old is None else f'  (was {old})'}")
    before, now = added.vocab_size
    print(f"{added.path}: {now:,} tokens, {before:,} before; set model.vocab_size to {now} or more")

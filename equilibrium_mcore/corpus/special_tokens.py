"""Adds control tokens to a tokenizer: a new file beside the old one, whose ids all stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.data.chat.vocabulary import ChatVocabulary
from equilibrium_mcore.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from equilibrium_mcore.files.paths import real_path
from equilibrium_mcore.files.whole import write_whole

_A_PIECE = (
    "{!r} is a piece that text is made of in {}: as a control token it would change how text is "
    "encoded; choose another name"
)


class AddedTokens(NamedTuple):
    """What was written.

    Attributes:
        ids: of each token: its old id, None where it is new, and its id now.
        vocab_size: before and now.
    """

    path: Path
    ids: dict[str, tuple[int | None, int]]
    vocab_size: tuple[int, int]


def add_special_tokens(
    config: TokenizerConfig, tokens: Sequence[str], output: Path, *, overwrite: bool = False
) -> AddedTokens:
    """Write the tokenizer of `config` with `tokens` as control tokens to `output`.

    `output` is a .model file, or for a Hugging Face tokenizer a folder, into which the files beside
    it are copied too. Tokens that are control tokens already keep their ids. Raises FileExistsError
    unless `overwrite`, and ValueError for tokens that cannot be added.
    """
    old = load_tokenizer(config)
    _check_tokens(tokens)
    is_model = isinstance(old, SentencePieceTokenizer)
    target = output if is_model else output / "tokenizer.json"
    if is_model and output.suffix != ".model":
        raise ValueError(f"--output {output}: a SentencePiece model's name ends in .model")
    if real_path(target) == real_path(old.path):
        raise ValueError(
            f"{target} is the tokenizer itself: models were trained with it, so write another file"
        )
    companions = [] if is_model else old.files()[1:]
    there = [p for p in (target, *(output / c.name for c in companions)) if p.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there[0]} exists: choose another --output, or give --overwrite")
    if is_model:
        write_whole(target, _with_pieces(old, tokens))
    else:
        write_whole(target, _with_added(old.path, tokens))
        for path in companions:
            write_whole(output / path.name, path.read_bytes())
    new = load_tokenizer(config.model_copy(update={"model": target}))
    return _compared(old, new, tokens)


def _check_tokens(tokens: Sequence[str]) -> None:
    for token in tokens:
        if len(token) < 2 or token != token.strip():
            raise ValueError(
                f"token {token!r}: a control token has two characters or more and no white space "
                "at its ends, e.g. <|im_end|>"
            )
    if len(set(tokens)) < len(tokens) or not tokens:
        raise ValueError(f"--tokens {' '.join(tokens)}: name each token once")


def _with_pieces(tokenizer: Tokenizer, tokens: Sequence[str]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.path.read_bytes())
    control = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    kinds = {entry.piece: entry.type for entry in proto.pieces}
    for token in tokens:
        if token not in kinds:
            proto.pieces.add(piece=token, score=0.0, type=control)
            proto.trainer_spec.control_symbols.append(token)
        elif kinds[token] != control:
            raise ValueError(_A_PIECE.format(token, tokenizer.path))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _with_added(path: Path, tokens: Sequence[str]) -> str:
    import tokenizers

    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    known: dict[str, dict[str, Any]] = {t["content"]: t for t in values.get("added_tokens") or []}
    next_id = 1 + max(vocabulary.values())
    for token in tokens:
        index = vocabulary.get(token)
        if index is None:
            index, next_id = next_id, next_id + 1
        elif token not in known:
            raise ValueError(_A_PIECE.format(token, path))
        known[token] = {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    values["added_tokens"] = sorted(known.values(), key=lambda entry: entry["id"])
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _compared(old: Tokenizer, new: Tokenizer, tokens: Sequence[str]) -> AddedTokens:
    """The report, after a look at what was written. Raises ValueError where an old id changed."""
    before, after = ChatVocabulary(old), ChatVocabulary(new)
    for index in range(old.vocab_size):
        if before.spelled(index) != after.spelled(index):
            raise ValueError(
                f"{new.path}: id {index} was {before.spelled(index)!r} and is "
                f"{after.spelled(index)!r} now; the tokenizer cannot be extended by this tool"
            )
    ids = {token: after.control(token) for token in tokens}
    return AddedTokens(
        new.path,
        {token: (i if i < old.vocab_size else None, i) for token, i in ids.items()},
        (old.vocab_size, new.vocab_size),
    )

"""A tokenizer as a Hugging Face folder: what `AutoTokenizer.from_pretrained` loads.

A `tokenizer.json` is copied with its companions. A SentencePiece BPE model is rewritten as one:
same pieces, same ids, merges in the order of the pieces' scores, bytes for what has no piece.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from equilibrium_mcore.data.tokenizer import (
    SPACE_MARK,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)


def save_release_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> list[Path]:
    """Write the tokenizer's files into `folder`, and return their paths.

    `max_length` is the sequence length in tokens, written as `model_max_length`. Raises ValueError
    for a SentencePiece model that is not BPE with byte fallback and identity normalization, which
    tools/train_tokenizer.py makes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in tokenizer.files():
        written.append(folder / path.name)
        if path.resolve() != written[-1].resolve():
            shutil.copyfile(path, written[-1])
    if isinstance(tokenizer, SentencePieceTokenizer):
        written.append(folder / "tokenizer.json")
        _write(written[-1], json.loads(_as_bpe(tokenizer).to_str()))
    config = folder / "tokenizer_config.json"
    if config not in written:
        _write(config, _tokenizer_config(tokenizer, max_length))
        written.append(config)
    return written


def _tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    names = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eod if tokenizer.eos_id is None else tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{key: token_of(tokenizer, index) for key, index in names.items() if index is not None},
    }


def token_of(tokenizer: Tokenizer, index: int) -> str:
    """The token with this id, as text."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.backend.id_to_token(index)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer.processor.id_to_piece(index)


def _as_bpe(tokenizer: SentencePieceTokenizer):
    """The same tokenizer in the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    _require_exact(tokenizer)
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(index) for index in range(tokenizer.vocab_size)]
    control = [
        piece for i, piece in enumerate(pieces) if processor.is_control(i) or i == tokenizer.unk_id
    ]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=_merges(processor, pieces),
        unk_token=pieces[tokenizer.unk_id] if tokenizer.unk_id is not None else None,
        byte_fallback=True,
        fuse_unk=True,
    )
    result = Tokenizer(model)
    result.normalizer = normalizers.Replace(" ", SPACE_MARK)
    result.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    result.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in control])
    return result


def _merges(processor, pieces: list[str]) -> list[tuple[str, str]]:
    """Every way to make a piece from two, best pieces first, as SentencePiece merges by score."""
    normal = {
        piece: index
        for index, piece in enumerate(pieces)
        if not (
            processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index)
        )
    }
    merges = []
    for piece in sorted(normal, key=lambda p: (-processor.get_score(normal[p]), normal[p])):
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges.extend(pair for pair in parts if pair[0] in normal and pair[1] in normal)
    return merges


def _require_exact(tokenizer: SentencePieceTokenizer) -> None:
    """Refuse models that the rewritten tokenizer would not equal."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString(tokenizer.path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    found = {
        "model_type": (trainer.ModelType.Name(trainer.model_type), "BPE"),
        "byte_fallback": (trainer.byte_fallback, True),
        "precompiled_charsmap": (bool(normalizer.precompiled_charsmap), False),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, False),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
    }
    wrong = [f"{key} is {got}, not {want}" for key, (got, want) in found.items() if got != want]
    if wrong:
        raise ValueError(
            f"{tokenizer.path} cannot be released as a tokenizer.json that gives the same ids: "
            f"{'; '.join(wrong)}. Use the model's own Hugging Face tokenizer.json "
            f"(type HuggingFaceTokenizer), or one of tools/train_tokenizer.py"
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)

"""The tokenizer of an exported folder: what `AutoTokenizer` needs, with the ids of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.data.chat.render import Renderer
from equilibrium_mcore.data.tokenizer import SPACE_MARK, SentencePieceTokenizer, Tokenizer
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.hugging_face.chat_files import add_chat_template

# Text that shows most ways in which two tokenizers differ.
PROBE = (
    "def f(x):\n\treturn {'a': x[0] ** 2}  # 1234\n\n        if x != 'y':\r\n"
    " leading, trailing and   inner spaces   \n\u00e9t\u00e9 na\u00efve \u4f60\u597d "
    "\U0001f680\u2581mark <|endoftext|></s><unk> "
)


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, renderer: Renderer | None = None
) -> None:
    """Write the tokenizer's files into `folder`, and read them back to compare ids.

    With a `renderer` of chats the folder gets its chat template, and ids of chats are compared too.
    Raises ValueError where a SentencePiece model uses what tokenizer.json cannot express, or where
    the written tokenizer gives other ids.
    """
    for file in tokenizer.files():
        shutil.copyfile(file, folder / _released_name(file, tokenizer))
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = sentencepiece_to_tokenizers(tokenizer)
        backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    # In training, text that spells a control token is plain text to SentencePiece, and that token
    # to `tokenizers`.
    splits = isinstance(tokenizer, SentencePieceTokenizer)
    if settings is None or settings.get("split_special_tokens", False) != splits:
        settings = (settings or _settings(tokenizer)) | {"split_special_tokens": splits}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text)
    if renderer is not None:
        add_chat_template(renderer, folder)
    check_same_ids(tokenizer, folder, [PROBE])


def _released_name(file: Path, tokenizer: Tokenizer) -> str:
    if file != tokenizer.path:
        return file.name
    is_sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    return "tokenizer.model" if is_sentencepiece else "tokenizer.json"


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    names = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eod,
        "pad_token": tokenizer.eod if tokenizer.pad_id is None else tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: _piece(tokenizer, index) for key, index in names.items() if index is not None},
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _piece(tokenizer: Tokenizer, index: int) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.processor.id_to_piece(index)
    return tokenizer.backend.id_to_token(index)  # type: ignore[attr-defined]


def sentencepiece_to_tokenizers(tokenizer: SentencePieceTokenizer) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of a SentencePiece BPE model with byte fallback.

    Pieces are written with real spaces, so nothing is normalized and U+2581 in a text stays itself.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    pieces = _normal_pieces(tokenizer)
    processor = tokenizer.processor
    vocabulary = {
        pieces.get(index, processor.id_to_piece(index)): index
        for index in range(tokenizer.vocab_size)
    }
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces, [processor.get_score(i) for i in range(tokenizer.vocab_size)]),
            unk_token=processor.id_to_piece(processor.unk_id()),
            byte_fallback=True,
            fuse_unk=False,
        )
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    control = [
        AddedToken(processor.id_to_piece(index), special=True, normalized=False)
        for index in range(tokenizer.vocab_size)
        if processor.is_control(index) or processor.is_unknown(index)
    ]
    backend.add_special_tokens(control)
    return backend


def _normal_pieces(tokenizer: SentencePieceTokenizer) -> dict[int, str]:
    """The pieces that text is made of, by id; raises ValueError for what is not supported."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    required = {
        "model_type=bpe": trainer.model_type == trainer.BPE,
        "byte_fallback=true": trainer.byte_fallback,
        "normalization_rule_name=identity": normalizer.name == "identity",
        "add_dummy_prefix=false": not normalizer.add_dummy_prefix,
        "remove_extra_whitespaces=false": not normalizer.remove_extra_whitespaces,
        "treat_whitespace_as_suffix=false": not trainer.treat_whitespace_as_suffix,
        "no user_defined_symbols": not trainer.user_defined_symbols,
    }
    broken = [rule for rule, holds in required.items() if not holds]
    if broken:
        raise ValueError(
            f"{tokenizer.path} cannot be written as a tokenizer.json that gives the same ids: it "
            f"needs {', '.join(broken)}. `{command('tokenizer')}` makes such a model; for another "
            f"one train with its own tokenizer.json (tokenizer type HuggingFaceTokenizer)"
        )
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    return {
        index: entry.piece.replace(SPACE_MARK, " ")
        for index, entry in enumerate(proto.pieces)
        if entry.type == normal
    }


def _merges(pieces: dict[int, str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two, best piece first, as SentencePiece merges."""
    known = {piece: index for index, piece in pieces.items()}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in known.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                merges.append((-scores[index], known[left], known[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def check_same_ids(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> None:
    """Raise ValueError unless the tokenizer in `folder` gives `tokenizer`'s ids and text back."""
    from transformers import AutoTokenizer, PreTrainedConfig

    # With a config given, AutoTokenizer does not ask whether to run the folder's modelling code.
    released = AutoTokenizer.from_pretrained(
        str(folder), config=PreTrainedConfig(), local_files_only=True
    )
    # A tokenizer with a chat template looks for control tokens, unless told not to.
    splits = isinstance(tokenizer, SentencePieceTokenizer)
    for text in texts:
        expected = tokenizer.encode(text)
        found = released.encode(text, add_special_tokens=False, split_special_tokens=splits)
        if expected != found:
            place = next(
                (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
                min(len(expected), len(found)),
            )
            raise ValueError(
                f"the tokenizer written to {folder} gives other ids than {tokenizer.path}: after "
                f"{tokenizer.decode(expected[:place])[-40:]!r} it gives {found[place : place + 5]} "
                f"instead of {expected[place : place + 5]}"
            )
        back, text_back = (
            tokenizer.decode(expected),
            released.decode(found, skip_special_tokens=True),
        )
        if text_back != back:
            raise ValueError(
                f"the tokenizer written to {folder} gives other text back than {tokenizer.path}: "
                f"{text_back!r} instead of {back!r}"
            )

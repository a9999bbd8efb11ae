"""The tokenizer of an exported folder: what `AutoTokenizer` needs, with the ids of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.data.chat.render import Renderer
from equilibrium_mcore.data.tokenizer import SPACE_MARK, SentencePieceTokenizer, Tokenizer
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.hugging_face.chat_files import add_chat_template
from equilibrium_mcore.hugging_face.tokenizer_settings import adapt_settings, token_text, write_json

# Text that shows most ways in which two tokenizers differ, and text that spells control tokens.
PLAIN_PROBE = (
    "def f(x):\n\treturn {'a': x[0] ** 2}  # 1234\n\n        if x != 'y':\r\n"
    " leading, trailing and   inner spaces   \n\u00e9t\u00e9 na\u00efve \u4f60\u597d "
    "\U0001f680\u2581mark \u0301cafe\u0301 don't WE'LL 12345678 a1b22 ___x--->y ;;\n\n\n  z\t "
)
PROBE = PLAIN_PROBE + "<|endoftext|></s><unk> "
# The class that loads tokenizer.json as it is; others may rebuild parts of it by their own recipe.
PLAIN_CLASS = "PreTrainedTokenizerFast"
COMPARED_PARTS = ("normalizer", "pre_tokenizer", "model")


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, renderer: Renderer | None = None
) -> list[str]:
    """Write the tokenizer's files into `folder`, and read them back to compare ids.

    Text gets training's ids by default: nothing is added at its ends. With a `renderer` of chats
    the folder gets its chat template, and ids of chats are compared too. Returns in words what was
    changed of the files beside the tokenizer. Raises ValueError where a SentencePiece model uses
    what tokenizer.json cannot express, or where the written tokenizer gives other ids.
    """
    for file in tokenizer.files():
        shutil.copyfile(file, folder / _released_name(file, tokenizer))
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = sentencepiece_to_tokenizers(tokenizer)
        with naming(folder / "tokenizer.json"):
            backend.save(str(folder / "tokenizer.json"))
    said = adapt_settings(tokenizer, folder, default=_settings(tokenizer))
    return said + _finish_and_check(tokenizer, folder, renderer)


def _finish_and_check(
    tokenizer: Tokenizer, folder: Path, renderer: Renderer | None, *, again: bool = False
) -> list[str]:
    """Compare parts and ids; where the class that is named builds others, name the plain one."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    named = settings.get("tokenizer_class")
    try:
        if not again:
            _check_same_parts(folder)
        check_same_ids(tokenizer, folder, [PROBE])
        if renderer is not None:
            add_chat_template(renderer, folder)
            check_same_ids(tokenizer, folder, [PROBE])
        return []
    except Exception:  # a class may fail on files that it was not made for, in any way
        if again or named == PLAIN_CLASS:
            raise
    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    write_json(path, settings | {"tokenizer_class": PLAIN_CLASS})
    _finish_and_check(tokenizer, folder, renderer, again=True)
    return [
        f"tokenizer_class {named} builds another tokenizer than {tokenizer.path} is: the export "
        f"names {PLAIN_CLASS}, which reads it as it is"
    ]


def _check_same_parts(folder: Path) -> None:
    """Raise ValueError where the class that is named does not take tokenizer.json as it is.

    A text shows a difference only if its tokens do.
    """
    from tokenizers import Tokenizer as Backend

    backends = (Backend.from_file(str(folder / "tokenizer.json")), load(folder).backend_tokenizer)
    ours, theirs = (json.loads(backend.to_str()) for backend in backends)
    other = [part for part in COMPARED_PARTS if _facts(ours[part]) != _facts(theirs[part])]
    if other:
        raise ValueError(f"{folder}: {', '.join(other)} of tokenizer.json is built by the class")


def _facts(part: dict[str, Any] | None) -> dict[str, Any]:
    """A part without what is empty: an absent prefix is written in two ways."""
    return {key: value for key, value in (part or {}).items() if value not in (None, "")}


def load(folder: Path) -> Any:
    """The tokenizer of a folder as users load it."""
    from transformers import AutoTokenizer, PreTrainedConfig

    # With a config given, AutoTokenizer does not ask whether to run the folder's modelling code.
    return AutoTokenizer.from_pretrained(
        str(folder), config=PreTrainedConfig(), local_files_only=True
    )


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
        "tokenizer_class": PLAIN_CLASS,
        **{key: token_text(tokenizer, index) for key, index in names.items() if index is not None},
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def sentencepiece_to_tokenizers(tokenizer: SentencePieceTokenizer) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of a SentencePiece BPE model with byte fallback.

    Pieces are written with real spaces, so U+2581 in a text stays itself, or becomes a space where
    the tokenizer's setting says so; nothing else is normalized.
    """
    from tokenizers import AddedToken, decoders, models, normalizers
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
    if not tokenizer.keeps_space_mark:
        backend.normalizer = normalizers.Replace(SPACE_MARK, " ")
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
    """Raise ValueError unless the tokenizer in `folder` gives `tokenizer`'s ids and text back.

    It is called as users call it. A tokenizer with a chat template looks for control tokens, which
    SentencePiece does not do in training: then its default is asked for text that spells none.
    """
    released = load(folder)
    splits = isinstance(tokenizer, SentencePieceTokenizer)
    asked: dict[str, bool] = {}
    if released.split_special_tokens != splits:
        asked = {"split_special_tokens": splits}
        _compare(tokenizer, released, folder, PLAIN_PROBE, {})
    for text in texts:
        _compare(tokenizer, released, folder, text, asked)


def _compare(
    tokenizer: Tokenizer, released: Any, folder: Path, text: str, asked: dict[str, bool]
) -> None:
    expected, found = tokenizer.encode(text), released(text, **asked)["input_ids"]
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
    back, text_back = tokenizer.decode(expected), released.decode(found, skip_special_tokens=True)
    if text_back != back:
        raise ValueError(
            f"the tokenizer written to {folder} gives other text back than {tokenizer.path}: "
            f"{text_back!r} instead of {back!r}"
        )

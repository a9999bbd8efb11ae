"""Tokenizers: a SentencePiece `.model` or a Hugging Face `tokenizer.json`, behind one interface.

What preprocessing, megatron-core's GPTDataset and the export need of a tokenizer is here and no
more. No torch, no megatron: a worker of the preprocessing starts in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.files.errors import reason

# Looked for in this order when the tokenizer itself names no end of text.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "<EOD>", "</s>", "<eos>")
PADDING_NAMES = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>")
# What Hugging Face needs beside the tokenizer itself, where it exists.
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
PLAIN_MARK = b"\0space_mark=space"  # hashed with a model whose texts are encoded so


class Tokenizer(ABC):
    """Text to ids and back. `eod` ends a document; ids that a tokenizer lacks are None.

    Attributes:
        path: the tokenizer's file.
        vocab_size: one more than the largest id.
        eod: id of the token that ends a document.
        bos_id, eos_id, pad_id, unk_id: ids, or None.
    """

    kind: str
    vocab_size: int
    eod: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no token added at either end."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control tokens leave no text."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that go with a release."""

    # Megatron-LM's names.
    def tokenize(self, text: str) -> list[int]:
        """`encode`."""
        return self.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        """`decode`."""
        return self.decode(ids)

    @property
    def eos(self) -> int:
        """End of text; megatron-core compares it with `pad`."""
        return self.eod if self.eos_id is None else self.eos_id

    @property
    def pad(self) -> int:
        """Padding, or -1: megatron-core's id that no data holds."""
        return -1 if self.pad_id is None else self.pad_id

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file: the manifest of a dataset keeps it."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What megatron-core hashes into the name of an index cache; holds no path."""
        return {"class": type(self).__name__, "sha256": self.fingerprint, "eod": self.eod}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    kind = "SentencePieceTokenizer"

    def __init__(
        self,
        path: Path,
        end_of_document: str | None = None,
        space_mark: Literal["kept", "space"] = "kept",
    ) -> None:
        """Load; raises ValueError for a file that SentencePiece cannot read or without an eod.

        `space_mark`: "kept" encodes U+2581 as its bytes, where the model has bytes; "space" as the
        library does, as a space.
        """
        import sentencepiece

        super().__init__(path)
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            # From bytes: the library prints to stderr when a file is bad.
            self.processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model") from None
        processor = self.processor
        self.vocab_size = processor.get_piece_size()
        self.bos_id = _known(processor.bos_id())
        self.eos_id = _known(processor.eos_id())
        self.unk_id = _known(processor.unk_id())
        self.pad_id = _known(processor.pad_id())
        if self.pad_id is None:
            self.pad_id = next(filter(None, map(self._id_of, PADDING_NAMES)), None)
        self.eod = _find_eod(path, self._id_of, self.eos_id, end_of_document)
        mark = processor.piece_to_id([f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()])
        self.keeps_space_mark = space_mark == "kept" and all(map(processor.is_byte, mark))
        self._mark_ids = mark if self.keeps_space_mark else None
        # A model without bytes gives the same ids either way.
        self._plain_mark = space_mark == "space" and all(map(processor.is_byte, mark))

    def _id_of(self, piece: str) -> int | None:
        index = self.processor.piece_to_id(piece)
        return index if self.processor.id_to_piece(index) == piece else None

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        if self._mark_ids is None or SPACE_MARK not in text:
            return self.processor.encode(text)
        # As a piece it would come back as a space; as bytes it comes back as itself.
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                ids.extend(self._mark_ids)
            ids.extend(self.processor.encode(part))
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """See Tokenizer. With plain space marks another one: the same text has other ids."""
        content = self.path.read_bytes() + (PLAIN_MARK if self._plain_mark else b"")
        return hashlib.sha256(content).hexdigest()

    def encode_batch(self, texts: list[str], *, threads: int) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        if self._mark_ids is None or not any(SPACE_MARK in text for text in texts):
            return self.processor.encode(texts, num_threads=threads)
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer."""
        return self.processor.decode(list(ids))

    def files(self) -> list[Path]:
        """See Tokenizer."""
        return [self.path]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library."""

    kind = "HuggingFaceTokenizer"

    def __init__(self, path: Path, end_of_document: str | None = None) -> None:
        """Load; raises ValueError for a file that `tokenizers` cannot read or without an eod."""
        import tokenizers

        super().__init__(path)
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{path} is not a Hugging Face tokenizer.json ({reason(error)})"
            ) from None
        # Documents are neither cut nor padded here, whatever the file says.
        self.backend.no_truncation()
        self.backend.no_padding()
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(f"{path} holds no token: name the file of a trained tokenizer")
        self.vocab_size = 1 + max(ids)
        named = self._named_tokens()
        self.bos_id = self._id_of(named.get("bos_token"))
        self.eos_id = self._id_of(named.get("eos_token"))
        self.unk_id = self._id_of(named.get("unk_token"))
        self.pad_id = self._id_of(named.get("pad_token"))
        self.eod = _find_eod(path, self._id_of, self.eos_id, end_of_document)

    def _named_tokens(self) -> dict[str, str]:
        """`eos_token` and so on from the tokenizer_config.json beside the file, if it is there."""
        config = self.path.with_name("tokenizer_config.json")
        if not config.is_file():
            return {}
        try:
            entries = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} cannot be read ({reason(error)})") from None
        tokens = {k: v for k, v in entries.items() if k.endswith("_token")}
        return {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in tokens.items()
            if isinstance(value, dict | str)
        }

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def files(self) -> list[Path]:
        """See Tokenizer."""
        companions = [self.path.with_name(name) for name in COMPANION_FILES]
        return [self.path, *(path for path in companions if path.is_file())]


_CLASSES: dict[str, tuple[type[Tokenizer], str]] = {
    "SentencePieceTokenizer": (SentencePieceTokenizer, "tokenizer.model"),
    "HuggingFaceTokenizer": (HuggingFaceTokenizer, "tokenizer.json"),
}


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` names.

    Raises FileNotFoundError when the file is not there, and ValueError when it cannot be read or
    has no token that ends a document.
    """
    tokenizer_class, usual_name = _CLASSES[config.type]
    path = Path(config.model)
    if path.is_dir():
        if not (path / usual_name).is_file():
            raise FileNotFoundError(
                f"tokenizer folder {path} holds no {usual_name}, which {config.type} reads; it "
                f"holds {_listing(path)}. {_other_type(config.type, path)}"
            )
        path = path / usual_name
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer file {path} does not exist. Train one with `{command('tokenizer')}`, or "
            f"name an existing file in tokenizer.model (--tokenizer-model)"
        )
    looks_like_json = path.suffix == ".json"
    if looks_like_json != (config.type == "HuggingFaceTokenizer"):
        raise ValueError(
            f"tokenizer file {path} is not what {config.type} reads ({usual_name}). "
            f"{_other_type(config.type, path.parent)}"
        )
    more = {}
    if issubclass(tokenizer_class, SentencePieceTokenizer):
        more = {"space_mark": config.space_mark}
    elif config.space_mark != "kept":
        raise ValueError(
            f"tokenizer.space_mark={config.space_mark!r} is for SentencePiece models, and {path} "
            f"is none: leave it out"
        )
    return tokenizer_class(path, config.end_of_document, **more)  # type: ignore[call-arg]


def _known(index: int) -> int | None:
    return index if index >= 0 else None


def _find_eod(path: Path, id_of, eos_id: int | None, end_of_document: str | None) -> int:
    """The id that ends a document: the named token, else end of text, else a usual name."""
    if end_of_document is not None:
        index = id_of(end_of_document)
        if index is None:
            raise ValueError(
                f"tokenizer {path} has no token {end_of_document!r}, which "
                f"tokenizer.end_of_document (--end-of-document) names"
            )
        return index
    if eos_id is not None:
        return eos_id
    for name in END_OF_DOCUMENT_NAMES:
        index = id_of(name)
        if index is not None:
            return index
    raise ValueError(
        f"tokenizer {path} has no token that ends a document: it names no end of text (eos), and "
        f"holds none of {', '.join(END_OF_DOCUMENT_NAMES)}. Name one of its tokens by "
        f"tokenizer.end_of_document (--end-of-document)"
    )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8] + (["..."] if len(names) > 8 else [])) or "nothing"


def _other_type(kind: str, folder: Path) -> str:
    other = next(name for name in _CLASSES if name != kind)
    if (folder / _CLASSES[other][1]).is_file():
        return f"For the {_CLASSES[other][1]} there set the type to {other}"
    return f"The other type is {other}, which reads a {_CLASSES[other][1]}"

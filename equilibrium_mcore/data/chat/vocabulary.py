"""What a chat asks of a tokenizer: control tokens by id, and text that can never become one.

A tokenizer reads text in two ways that are no good for what a user writes: `tokenizers` turns text
that spells a control token into that token. Here such text is encoded as plain text, always.
"""

from __future__ import annotations

from functools import cached_property

from equilibrium_mcore.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

# Unicode keeps these code points for programs' own use, and text never holds them (Unicode 16,
# section 23.7). The exported chat template writes them between pieces of text; see `jinja_text`.
ESCAPE, BORDER = "\ufdd0", "\ufdd1"
REPLACEMENT = "\ufffd"


def clean(text: str) -> str:
    """`text` with the two reserved code points replaced, as Unicode asks for foreign ones."""
    return text.replace(ESCAPE, REPLACEMENT).replace(BORDER, REPLACEMENT)


class ChatVocabulary:
    """A tokenizer as chats use it.

    Attributes:
        tokenizer: the tokenizer of the run.
        controls: text and id of every control token: those that text must not become.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises TypeError for a kind of tokenizer that is not known."""
        self.tokenizer = tokenizer
        if isinstance(tokenizer, SentencePieceTokenizer):
            # SentencePiece never reads control pieces in a text.
            self.controls, self._encode = _control_pieces(tokenizer), tokenizer.encode
        elif isinstance(tokenizer, HuggingFaceTokenizer):
            self.controls = _special_tokens(tokenizer)
            self._plain = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
            self._plain.encode_special_tokens = True  # that is: as any other text
            self._encode = lambda text: self._plain.encode(text, add_special_tokens=False).ids
        else:
            raise TypeError(f"no chats with a {type(tokenizer).__name__}")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, of which none is a control token's. Nothing is added at either end."""
        return self._encode(clean(text)) if text else []

    def control(self, token: str | None) -> int:
        """The id of a control token; None is the end of document. Raises KeyError."""
        return self.tokenizer.eod if token is None else self.controls[token]

    @cached_property
    def end_of_document(self) -> str:
        """How the end of document is spelled."""
        return self.spelled(self.tokenizer.eod)

    def spelled(self, index: int) -> str:
        """How the token with this id is spelled."""
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            return self.tokenizer.processor.id_to_piece(index)
        return self.tokenizer.backend.id_to_token(index)  # type: ignore[attr-defined]

    def named(self) -> dict[str, str]:
        """`bos_token` and so on as a Jinja template knows them, where the tokenizer has them."""
        tokenizer = self.tokenizer
        sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
        ids = {
            "bos_token": tokenizer.bos_id,
            "eos_token": tokenizer.eod if sentencepiece else tokenizer.eos,
            "unk_token": tokenizer.unk_id,
            "pad_token": tokenizer.pad_id,
        }
        return {name: self.spelled(index) for name, index in ids.items() if index is not None}

    def problem_with(self, token: str | None) -> str | None:
        """Why a template cannot use `token` as a control token, or None where it can."""
        text = self.end_of_document if token is None else token
        if text in self.controls:
            return None
        if not self._is_known(text):
            return "is not in the tokenizer"
        return "is an ordinary piece there, so that what a user writes could be read as it"

    def _is_known(self, text: str) -> bool:
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            processor = self.tokenizer.processor
            return processor.id_to_piece(processor.piece_to_id(text)) == text
        return self.tokenizer.backend.token_to_id(text) is not None  # type: ignore[attr-defined]


def _control_pieces(tokenizer: SentencePieceTokenizer) -> dict[str, int]:
    processor = tokenizer.processor
    return {
        processor.id_to_piece(index): index
        for index in range(tokenizer.vocab_size)
        if processor.is_control(index) or processor.is_unknown(index)
    }


def _special_tokens(tokenizer: HuggingFaceTokenizer) -> dict[str, int]:
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: index for index, token in sorted(added.items()) if token.special}

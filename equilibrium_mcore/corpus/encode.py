"""Many texts to token ids at once: the seam between text and tokenizers.

`load_encoder` gives a BatchEncoder. There are two: the plain one calls the tokenizer itself
(`tokenizers` or SentencePiece), the fast one calls `fastokens`, which does byte-level BPE twenty
times as fast. The fast one is used only where it was compared with the plain one first:
`fast_path.py` says when.

No torch and no megatron here, so that a process of the preprocessing starts fast.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.corpus.fast_path import compare_with_plain, reason_against
from equilibrium_mcore.data.indexed_files import token_dtype
from equilibrium_mcore.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

# How many threads fastokens takes, and tokenizers.
THREAD_VARIABLES = ("FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS")
EncoderChoice = Literal["auto", "fast", "plain"]
Texts = Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class EncoderPlan:
    """Which encoder a tokenizer gets, and what a dataset's manifest says of it; can be pickled.

    Attributes:
        fast: whether fastokens encodes.
        reason: why not, if not.
    """

    config: TokenizerConfig
    path: Path
    fast: bool
    reason: str | None
    kind: str
    eod: int
    vocab_size: int
    fingerprint: str

    @property
    def dtype(self) -> np.dtype:
        """uint16 or int32, as megatron-core chooses."""
        return np.dtype(token_dtype(self.vocab_size))


class BatchEncoder(ABC):
    """Texts to ids, many at once, in order.

    Attributes:
        eod: id of the token that ends a document; `encode` does not add it.
        vocab_size: one more than the largest id.
        dtype: of the ids.
        fingerprint: SHA-256 of the tokenizer's file.
        name: "fast" or "plain".
    """

    name: str

    def __init__(self, plan: EncoderPlan) -> None:
        self.plan = plan
        self.eod = plan.eod
        self.vocab_size = plan.vocab_size
        self.dtype = plan.dtype
        self.fingerprint = plan.fingerprint

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other ([tokens], `dtype`), and each one's number of
        ids ([texts], int64). Bytes are UTF-8. Raises UnicodeError for bytes that are not, and
        for a str with half of a surrogate pair.
        """
        ids, lengths = self._encode(
            [text.decode() if isinstance(text, bytes) else text for text in texts]
        )
        return ids.astype(self.dtype, copy=False), lengths

    @abstractmethod
    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """`encode` with ids of any integer type."""


class PlainEncoder(BatchEncoder):
    """The tokenizer's own library, as `Tokenizer.encode` does it."""

    name = "plain"

    def __init__(self, plan: EncoderPlan, tokenizer: Tokenizer, threads: int) -> None:
        super().__init__(plan)
        self.tokenizer = tokenizer
        self.threads = threads

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        for text in texts:
            text.encode()  # a surrogate is an error here, and not a replacement character
        tokenizer = self.tokenizer
        if self.threads > 1 and isinstance(tokenizer, HuggingFaceTokenizer):
            encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
            rows = [encoding.ids for encoding in encodings]
        elif self.threads > 1 and isinstance(tokenizer, SentencePieceTokenizer):
            rows = tokenizer.encode_batch(texts, threads=self.threads)
        else:
            rows = [tokenizer.encode(text) for text in texts]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.empty(int(lengths.sum()), self.dtype)
        end = 0
        for row in rows:
            ids[end : end + len(row)] = row
            end += len(row)
        return ids, lengths


class FastEncoder(BatchEncoder):
    """fastokens: byte-level BPE of a tokenizer.json, with a cache of words of bounded size."""

    name = "fast"

    def __init__(self, plan: EncoderPlan) -> None:
        super().__init__(plan)
        self.backend = _load_fastokens(plan.path)
        self._plain: PlainEncoder | None = None

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self.backend.encode_batch_flat(texts)
        except UnicodeError:
            raise
        except Exception as error:  # a limit of its regex engine, on a text that nobody foresaw
            if self._plain is None:
                print(f"fastokens: {error}; texts around go the plain way", file=sys.stderr)
                self._plain = PlainEncoder(self.plan, load_tokenizer(self.plan.config), 1)
            return self._plain.encode(texts)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))


def _load_fastokens(path: Path):
    from fastokens._native import Tokenizer as Backend  # not the package: it imports transformers

    backend = Backend.from_file(str(path))
    backend.no_truncation()  # documents are not cut here, whatever the file says
    backend.no_padding()
    return backend


def load_encoder(
    tokenizer: TokenizerConfig, *, threads: int = 1, choice: EncoderChoice = "auto"
) -> BatchEncoder:
    """An encoder of this tokenizer.

    Args:
        threads: how many threads encode at most. The Rust libraries keep one pool of threads a
            process, whose size is fixed when they first run: of two encoders in one process with
            different numbers, the first decides. Where the user set THREAD_VARIABLES, they do.
        choice: "auto" takes the fast encoder where it is exact, and says in one line on stderr
            why not (of a SentencePiece model it says nothing: there is no fast encoder). "fast"
            raises ValueError instead. "plain" does not look.

    Raises what `load_tokenizer` raises, and ValueError.
    """
    plan, loaded = _plan(tokenizer, choice, threads)
    return FastEncoder(plan) if plan.fast else PlainEncoder(plan, loaded, threads)


def plan_encoder(tokenizer: TokenizerConfig, *, choice: EncoderChoice = "auto") -> EncoderPlan:
    """Decide which encoder a tokenizer gets; `open_encoder` then opens it in any process.

    Starts no thread, so that a process may fork afterwards.
    """
    return _plan(tokenizer, choice, 1)[0]


def open_encoder(plan: EncoderPlan, *, threads: int = 1) -> BatchEncoder:
    """The encoder that was planned, without a second check; `threads` as for `load_encoder`."""
    _limit_threads(threads)
    if plan.fast:
        return FastEncoder(plan)
    return PlainEncoder(plan, load_tokenizer(plan.config), threads)


def _plan(
    config: TokenizerConfig, choice: EncoderChoice, threads: int
) -> tuple[EncoderPlan, Tokenizer]:
    _limit_threads(threads)
    loaded = load_tokenizer(config)
    reason = "the plain encoder was asked for"
    if choice != "plain":
        reason = reason_against(loaded)
    if choice != "plain" and reason is None:
        reason = compare_with_plain(loaded, _load_fastokens)
    if choice == "fast" and reason is not None:
        raise ValueError(
            f"tokenizer {loaded.path}: the fast encoder does not do it exactly: {reason}. Use "
            f"--encoder auto, which takes the plain encoder for it"
        )
    if choice == "auto" and reason is not None and isinstance(loaded, HuggingFaceTokenizer):
        print(f"tokenizer {loaded.path}: plain encoder, since {reason}", file=sys.stderr)
    plan = EncoderPlan(
        config=config,
        path=loaded.path,
        fast=reason is None,
        reason=reason,
        kind=loaded.kind,
        eod=loaded.eod,
        vocab_size=loaded.vocab_size,
        fingerprint=loaded.fingerprint,
    )
    return plan, loaded


def _limit_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"{threads} threads: at least 1 is needed")
    # The libraries read them when they first run; there is no other way to tell them.
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, str(threads))

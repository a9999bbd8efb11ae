"""Train a SentencePiece tokenizer (BPE with byte fallback) that gives text back exactly.

No normalization, no dummy prefix, no removal of spaces; runs of spaces may be pieces, digits stand
alone, and characters that the vocabulary lacks become bytes. So code, tabs and any Unicode survive.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.data.compression import (
    compression_of,
    decompressed_blocks,
    refuse_pipe,
)
from equilibrium_mcore.data.jsonl import parse_object, texts_of
from equilibrium_mcore.data.text_files import lines_of
from equilibrium_mcore.files.replace import refuse_existing, refuse_sources
from equilibrium_mcore.files.whole import write_whole

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # control tokens, ready for fine-tuning
HELD_OUT_EVERY = 50  # one document of this many is kept for the summary
MAX_HELD_OUT_BYTES = 500_000
MAX_PIECE_OF_TEXT = 1000  # characters; SentencePiece skips sentences over 4192 bytes
SMALLEST_VOCABULARY = 512


@dataclass(frozen=True)
class TokenizerSummary:
    """What a training gave: sizes, bytes per token on text that was held out, seconds."""

    path: Path
    vocab_size: int
    trained_bytes: int
    held_out_bytes: int
    bytes_per_token: float
    seconds: float


def train_tokenizer(
    *,
    inputs: Sequence[Path],
    output: Path,
    vocab_size: int,
    json_key: str = "text",
    max_megabytes: float = 10.0,
    special_tokens: Sequence[str] = CHAT_TOKENS,
    seed: int = 1234,
    threads: int | None = None,
    overwrite: bool = False,
) -> TokenizerSummary:
    """Train on a sample of the JSONL `inputs` and write the `.model` to `output`.

    Ids: 0 `<unk>`, 1 `<|endoftext|>`, 2 `<|padding|>`, then `special_tokens`, 256 bytes, pieces.
    All of these are control tokens: text that spells them is encoded as plain text.
    A model that is there is replaced only with `overwrite`. Raises FileNotFoundError,
    FileExistsError, and ValueError for too little text or a vocabulary out of reach.
    """
    import sentencepiece

    started = time.perf_counter()
    refuse_sources([output], inputs, option="--output")
    refuse_existing(
        [output],
        overwrite=overwrite,
        is_ours=_is_model,
        what="a SentencePiece model",
        option="--output",
    )
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: 256 bytes, the characters of the text and "
            f"the control tokens need places; use at least {SMALLEST_VOCABULARY}"
        )
    documents = _sample(inputs, json_key, max_megabytes * 1e6, seed)
    held_out, training = documents[::HELD_OUT_EVERY], []
    for start in range(1, HELD_OUT_EVERY):
        training.extend(documents[start::HELD_OUT_EVERY])
    if not training:
        raise ValueError(f"{_names(inputs)}: at least 2 documents are needed to train a tokenizer")
    trained_bytes = sum(len(text.encode()) for text in training)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_pieces(training),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            pad_id=2,
            bos_id=-1,
            eos_piece=END_OF_TEXT,
            pad_piece=PADDING,
            control_symbols=list(special_tokens),
            num_threads=threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"a vocabulary of {vocab_size} cannot be made from {trained_bytes:,} bytes of text "
            f"({str(error).splitlines()[0]}); give more text, or another --vocab-size"
        ) from None
    write_whole(output, model.getvalue())

    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    held_out_text = "".join(held_out)[:MAX_HELD_OUT_BYTES]
    held_out_bytes = len(held_out_text.encode())
    return TokenizerSummary(
        path=output,
        vocab_size=processor.get_piece_size(),
        trained_bytes=trained_bytes,
        held_out_bytes=held_out_bytes,
        bytes_per_token=held_out_bytes / max(1, len(processor.encode(held_out_text))),
        seconds=time.perf_counter() - started,
    )


def _is_model(path: Path) -> bool:
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, ValueError):
        return False
    return path.stat().st_size > 0


def _sample(inputs: Sequence[Path], key: str, max_bytes: float, seed: int) -> list[str]:
    """About `max_bytes` of text, the same share of documents from each input, in shuffled order."""
    for path in inputs:
        refuse_pipe(path)
    missing = [str(path) for path in inputs if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"--input: no such file: {', '.join(missing)}")
    total = sum(map(_content_bytes, inputs))
    keep = min(1.0, max_bytes / max(1, total))
    generator = random.Random(seed)
    documents: list[str] = []
    for path in inputs:
        for number, line in lines_of(path):
            if generator.random() >= keep or not line.strip():
                continue
            try:
                documents += texts_of(parse_object(line), [key])
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}; repair the line, or name the field by "
                    f"--json-key"
                ) from None
    generator.shuffle(documents)
    return documents


def _content_bytes(path: Path) -> int:
    """Bytes of a file's text, of which a compressed one has more than the file."""
    compression = compression_of(path)
    if compression is None:
        return path.stat().st_size
    return sum(len(block) for block, _ in decompressed_blocks(path, compression))


def _pieces(documents: Sequence[str]) -> Iterator[str]:
    """Documents cut at line ends into pieces that SentencePiece does not skip for their length."""
    for text in documents:
        lines, length = [], 0
        for line in text.splitlines(keepends=True):
            while len(line) > MAX_PIECE_OF_TEXT:
                yield line[:MAX_PIECE_OF_TEXT]
                line = line[MAX_PIECE_OF_TEXT:]
            if lines and length + len(line) > MAX_PIECE_OF_TEXT:
                yield "".join(lines)
                lines, length = [], 0
            lines.append(line)
            length += len(line)
        if lines:
            yield "".join(lines)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))

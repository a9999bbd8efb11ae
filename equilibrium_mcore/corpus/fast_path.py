"""Whether fastokens encodes a tokenizer exactly as `tokenizers` does, before it is used.

Two questions. `reason_against` reads the tokenizer.json: a part that fastokens does not know, or
that was seen to differ, is a reason. `compare_with_plain` then encodes a probe with both: text of
every kind that has made such libraries differ. A difference is a reason, too. Both answer with
words that follow "since ...".
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from equilibrium_mcore.data.tokenizer import HuggingFaceTokenizer, Tokenizer

# Parts of a tokenizer.json that were compared on all of Unicode (fastokens 0.3.5, tokenizers
# 0.23.3; tests/data/test_encode.py). Anything else goes the plain way.
EXACT_NORMALIZERS = ("NFC",)
EXACT_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Split")
PROBE_SEED = 20260101
RUN_LENGTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 300)
RUN_CHARACTERS = (
    " ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "a", "A", "1", "!", "=", "_",
    "é", "你", "🎉", "\u0301",
)  # fmt: skip
FRAGMENTS = (
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "\x85", "\u200b", "\u200d", "\ufeff",
    "'s", "'S", "'ll", "'LL", "\u2019t", "don't", "\u017f", "\u212a", "the", " The", "camelCase",
    "1", "12", "123", "1234", "٣", "½", "²", "_", "-", "...", "#!", "HTTP", "\x00", "\x7f",
    "\u0301", "e\u0301", "\u1e9b\u0323", "\u212b", "ﬁ", "é", "Привет", "你好", "שלום", "한국어",
    "\u1112\u1161\u11ab", "ไทย", "हिन्दी", "🎉", "👩\u200d💻", "🇩🇪",
    "\ue000", "\U000f0000", "\U0010ffff",
)  # fmt: skip
# First and last code point, and the step between samples.
PLANES = ((0x250, 0xD800, 29), (0xE000, 0x20000, 61), (0x20000, 0x110000, 4999))


def reason_against(tokenizer: Tokenizer) -> str | None:
    """What in the tokenizer's file speaks against the fast encoder, or None."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return f"the fast one reads a tokenizer.json, not a {tokenizer.path.name}"
    content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    return next(_reasons(content), None)


def _reasons(content: dict[str, Any]) -> Iterator[str]:
    model = content.get("model") or {}
    # Old files name no type; what has merges is BPE.
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        yield f"its model is {kind}, and the fast one does BPE"
    if model.get("dropout"):
        yield "its BPE draws merges by chance (dropout)"
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            yield f"its BPE has {name}, which was not compared"
    for part in _parts(content.get("normalizer"), "normalizers"):
        if part["type"] not in EXACT_NORMALIZERS:
            yield f"its normalizer {part['type']} was not compared"
    splits = list(_parts(content.get("pre_tokenizer"), "pretokenizers"))
    for part in splits:
        if part["type"] not in EXACT_PRE_TOKENIZERS:
            yield f"its pre-tokenizer {part['type']} was not compared"
        if part.get("add_prefix_space"):
            yield "its pre-tokenizer puts a space in front, where a difference was seen"
    if not any(part["type"] == "ByteLevel" for part in splits):
        yield "it is not byte-level"


def _parts(section: dict[str, Any] | None, nested: str) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, or the members of a Sequence of them."""
    if section is None:
        return
    if section.get("type") == "Sequence":
        for member in section.get(nested) or []:
            yield from _parts(member, nested)
    else:
        yield section


def compare_with_plain(
    tokenizer: Tokenizer, load_backend: Callable, more_texts: Sequence[str] = ()
) -> str | None:
    """Encode the probe with both, and `more_texts`; what differed, or None.

    `load_backend(path)` is fastokens.
    """
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    try:
        backend = load_backend(tokenizer.path)
    except ImportError as error:
        return f"fastokens cannot be imported ({error})"
    except Exception as error:  # whatever the library raises, there is the plain way
        return f"fastokens does not read it ({error})"
    added = [
        entry.content for entry in list(tokenizer.backend.get_added_tokens_decoder().values())[:64]
    ]
    texts = [*probe_texts(added), *more_texts]
    flat, offsets = backend.encode_batch_flat(texts)
    ids = np.frombuffer(flat, "<u4")
    ends = np.frombuffer(offsets, "<u8").astype(np.int64)
    for number, text in enumerate(texts):
        if ids[ends[number] : ends[number + 1]].tolist() != tokenizer.encode(text):
            return f"fastokens differs from tokenizers on {ascii(text[:40])}"
    return None


def probe_texts(added_tokens: list[str]) -> list[str]:
    """Some 700 short texts, the same at every call: samples of every plane of Unicode, runs of
    one character, and fragments in random order with the tokenizer's own added tokens."""
    generator = random.Random(PROBE_SEED)
    texts = ["", "".join(map(chr, range(0x250)))]
    for first, last, step in PLANES:
        points = [chr(point) for point in range(first, last, step)]
        texts += ["".join(points[i : i + 50]) for i in range(0, len(points), 50)]
        texts += [" ".join(points[i : i + 50]) for i in range(7, len(points), 350)]
    for character in RUN_CHARACTERS:
        texts += [f"{character * n}x {character * n}" for n in RUN_LENGTHS]
    fragments = [*FRAGMENTS, *added_tokens]
    for _ in range(200):
        chosen = generator.choices(fragments, k=generator.randrange(1, 40))
        texts.append("".join(chosen))
    texts += [f"a {token}  b{token}{token[:-1]}{token[1:]} {token}c" for token in added_tokens]
    return texts

"""Texts as filters that compare documents see them: what does not count is gone, words are cut.

The simplification is datatrove's (`datatrove.utils.text.simplify_text`), step by step as the
setting `ignore` asks for it. It was made for prose: with `numbers` every sum is the same sum.

Words stand between white space; in scripts that put none between words (Chinese, Japanese, Thai
and the like) every character counts as one, since telling words there needs a dictionary.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import regex

from equilibrium_mcore.config.filters import Ignored
from equilibrium_mcore.corpus.filters.optional import require

_SCRIPTS = "Han Hiragana Katakana Bopomofo Thai Lao Khmer Myanmar Tibetan Javanese Tai_Tham".split()
_UNSPACED = "".join(rf"\p{{Script={name}}}" for name in _SCRIPTS) + "ー"
_PART = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^{_UNSPACED}]+")
_ANY_UNSPACED = regex.compile(f"[{_UNSPACED}]")


def comparable(text: str, ignore: Collection[Ignored], *, wanted_by: str) -> str:
    """`text` without what is ignored, with single spaces.

    A text of which nothing is left (of punctuation alone) stays as it is: two of them are not the
    same. Raises MissingLibraryError when datatrove is missing.
    """
    simplify = require("datatrove.utils.text", wanted_by=wanted_by).simplify_text
    # datatrove's punctuation has the full-width 1, alone among digits.
    simple = simplify(text.replace("\uff11", "1"), normalization(frozenset(ignore), wanted_by))
    return simple or " ".join(text.split())


@cache
def normalization(ignore: frozenset[Ignored], wanted_by: str) -> Any:
    """datatrove's settings for what is ignored."""
    return require("datatrove.utils.text", wanted_by=wanted_by).TextNormConfig(
        lowercase="case" in ignore,
        norm_numbers="numbers" in ignore,
        remove_punctuation="punctuation" in ignore,
        norm_unicode_diacritics="accents" in ignore,
    )


def comparable_words(text: str, ignore: Collection[Ignored], *, wanted_by: str) -> list[str]:
    """The words of `comparable` text."""
    return by_script(comparable(text, ignore, wanted_by=wanted_by).split())


def by_script(words: list[str]) -> list[str]:
    """`words`, each cut where a script has no spaces: a character of it is a word."""
    if not any(_ANY_UNSPACED.search(word) for word in words):
        return words
    return [part for word in words for part in _PART.findall(word)]

"""Words and sentences without any download, in the form that datatrove's filters take.

datatrove's own tokenizers for English and most languages are spaCy's, an install of their own. The
rules here need nothing: a word is a run of letters, digits and marks, with apostrophes and full
stops inside (`don't`, `os.path`, `3.14`); of other characters each run of the same one is a word by
itself (`...`, `!`). A sentence ends after
`.`, `!`, `?` or their like in other scripts, with closing quotes, before white space or a line end.
They suit languages that put spaces between words; for others name datatrove's tokenizer.
"""

from __future__ import annotations

import regex
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from equilibrium_mcore.corpus.filters.comparable import by_script

_LETTERS = r"[\p{L}\p{N}\p{M}_]+"
_JOINT = r"['’](?=\p{L})|\.(?=[\p{N}_\p{Ll}])|(?<=\p{Lu})\.(?=\p{Lu})|(?<=\p{N})[,:](?=\p{N})"
_WORD = regex.compile(rf"{_LETTERS}(?:(?:{_JOINT}){_LETTERS})*|([^\s\p{{L}}\p{{N}}\p{{M}}_])\1*")
_SENTENCE_END = regex.compile(r"""[.!?…]+["'”’)\]]*(?=\s|$)|[。！？｡।؟۔]+[」』”’]*""")


class UnicodeWords(WordTokenizer):
    """Words by Unicode classes of characters, sentences by their closing marks."""

    def __init__(self) -> None:
        super().__init__("unicode")

    def word_tokenize(self, text: str) -> list[str]:
        """Words and marks in order; joined they are the text without its white space."""
        return [match[0] for match in _WORD.finditer(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of every sentence; what follows the last closing mark is one too."""
        spans, start = [], 0
        for match in _SENTENCE_END.finditer(text):
            spans.append((start, match.end()))
            start = match.end()
        if text[start:].strip() or not spans:
            spans.append((start, len(text)))
        return spans

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences, stripped; empty ones are left out."""
        sentences = (text[start:end].strip() for start, end in self.span_tokenize(text))
        return [sentence for sentence in sentences if sentence]


class WordsByScript(UnicodeWords):
    """The same, with a word for each character of a script that has no spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        """See `comparable.by_script`."""
        return by_script(super().word_tokenize(text))


UNICODE_WORDS = UnicodeWords()
WORDS_BY_SCRIPT = WordsByScript()


def word_tokenizer(name: str) -> WordTokenizer:
    """`unicode`, or datatrove's tokenizer for the language with this code.

    Raises ValueError for a code that datatrove does not know, ImportError when the library of that
    tokenizer is missing.
    """
    return UNICODE_WORDS if name == "unicode" else load_word_tokenizer(name)

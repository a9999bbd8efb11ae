"""Prompts that a policy answers: rows with a truth, encoded once, in an order that resumes.

    {"prompt": TEXT or messages, "truth": ...}
    {"messages" or "conversations": [...], "truth": ...}     without an assistant's last turn

`truth` is what an answer is judged by, any value of JSON: a true answer, or tests. A prompt's ids
end with the header of the answer to come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from equilibrium_mcore.config.chat import PromptsConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.conversations import (
    ConversationError,
    read_rows,
    read_text,
    read_turns,
)
from equilibrium_mcore.data.chat.encode import EncodingReport, SourceCounts, refuse_all
from equilibrium_mcore.data.chat.render import Renderer, build_renderer
from equilibrium_mcore.data.chat.segments import Turn, joined
from equilibrium_mcore.data.ledger.permutation import Permutation
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer

Part = Literal["train", "validation"]
_HISTORIES = ("messages", "conversations")


class PromptRow(NamedTuple):
    """A row: the turns before the answer, what it is judged by, and the number of its line."""

    turns: tuple[Turn, ...]
    truth: Any
    line: int


class EncodedPrompt(NamedTuple):
    """`ids` int32 [n], to be continued by an answer; `text` as rewards get it."""

    ids: np.ndarray
    truth: Any
    text: str
    source: str


def parse_prompt(
    row: Mapping[str, Any], line: int = 0, *, truth: str | None = "truth"
) -> PromptRow:
    """A row in one of the forms; `truth` is the key of its truth, or None where rows have none.

    Raises ConversationError.
    """
    if truth is not None and truth not in row:
        held = ", ".join(map(repr, list(row)[:8])) or "no key"
        raise ConversationError(
            truth, f"missing; an answer is judged by it (data.truth names the key). It has {held}"
        )
    turns = tuple(_turns(row))
    if turns[-1].role == "assistant":
        raise ConversationError(
            "messages", "ends with an assistant's message: it is the policy that shall answer"
        )
    return PromptRow(turns, None if truth is None else row[truth], line)


def _turns(row: Mapping[str, Any]) -> Iterator[Turn]:
    for key in ("prompt", *_HISTORIES):
        if key in row and row[key] is not None:
            if isinstance(row[key], str):
                yield Turn("user", read_text(row[key], key))
            else:
                yield from read_turns(row, key)
            return
    held = ", ".join(map(repr, list(row)[:8])) or "no key"
    raise ConversationError("", f"none of the keys prompt, {', '.join(_HISTORIES)}; it has {held}")


def read_prompts(path: Path, *, truth: str | None) -> Iterator[PromptRow]:
    """The prompts of a JSONL file, as `conversations.read_rows` gives rows."""
    return read_rows(path, partial(parse_prompt, truth=truth))


class PromptSamples(Samples):
    """Prompts in the order of a run: each epoch a seeded permutation of all of them.

    Number n is what a run asks n-th, without end; so a number of prompts asked says it all.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        seed: int,
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
    ) -> None:
        """`stop_ids` end an answer; `tokenizer` is the one that made the ids."""
        self.prompts, self.seed = list(prompts), seed
        self.tokenizer, self.stop_ids = tokenizer, stop_ids

    @property
    def pad_id(self) -> int:
        """What stands where nothing counts."""
        tokenizer = self.tokenizer
        return tokenizer.eod if tokenizer.pad_id is None else tokenizer.pad_id

    def __len__(self) -> int:
        """How many prompts an epoch has."""
        return len(self.prompts)

    def __getitem__(self, number: int) -> EncodedPrompt:
        epoch, place = divmod(number, len(self.prompts))
        order = Permutation(len(self.prompts), f"prompts/{self.seed}/{epoch}")
        return self.prompts[int(order(place, place + 1)[0])]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the prompts and truths, in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            digest.update(len(prompt.ids).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(prompt.ids, "<i4").tobytes())
            digest.update(json.dumps(prompt.truth, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def build_prompts(
    config: PromptsConfig, *, part: Part = "train", longest: int, vocab_size: int, seed: int
) -> tuple[PromptSamples, EncodingReport]:
    """The prompts of a part, of at most `longest` tokens and `config.max_tokens`.

    Raises ConfigError for files and rows that cannot be read, control tokens that the tokenizer
    lacks, prompts that are too long where these are refused, and where nothing is left.
    """
    if config.max_tokens is not None and config.max_tokens > longest:
        raise ConfigError(
            f"data.max_tokens={config.max_tokens:,}: with training.sequence_length and "
            f"rollout.max_new_tokens as they are, a prompt has room for {longest:,} tokens; lower "
            "it, or leave it out"
        )
    longest = min(longest, config.max_tokens or longest)
    renderer = build_renderer(config.template, load_tokenizer(config.tokenizer))
    report, kept, refused = EncodingReport(unit="prompts"), [], []
    for source in config.sources:
        counts = report.sources.setdefault(source.name, SourceCounts())
        for path in getattr(source, part):
            for row in read_prompts(path, truth=config.truth):
                counts.read += 1
                prompt = _encoded(renderer, row, source.name)
                problem = _unfit(prompt.ids, longest, vocab_size)
                if problem and config.too_long == "drop" and len(prompt.ids) > longest:
                    counts.too_long += 1
                elif problem:
                    refused.append(f"{path}, line {row.line}: {problem}")
                else:
                    counts.kept += 1
                    counts.tokens += len(prompt.ids)
                    kept.append(prompt)
    refuse_all(refused, source="prompts")
    if not kept:
        raise ConfigError(f"no prompt is left for {part}: {report}", source="prompts")
    tokenizer = renderer.vocabulary.tokenizer
    stop = tokenizer.eod if renderer.stop is None else renderer.stop
    return PromptSamples(kept, seed=seed, tokenizer=tokenizer, stop_ids=(stop,)), report


def _encoded(renderer: Renderer, row: PromptRow, source: str) -> EncodedPrompt:
    ids, _ = joined(renderer.segments(row.turns, prompt=True))
    text = "\n\n".join(turn.content for turn in row.turns)
    return EncodedPrompt(ids, row.truth, text, source)


def _unfit(ids: np.ndarray, longest: int, vocab_size: int) -> str:
    if len(ids) > longest:
        return (
            f"{len(ids):,} tokens, and a prompt may have {longest:,}: raise "
            "training.sequence_length (or data.max_tokens, where it is set), lower "
            "rollout.max_new_tokens, or set data.too_long to drop"
        )
    if len(ids) and int(ids.max()) >= vocab_size:
        return (
            f"the token id {int(ids.max()):,}, but the model's vocabulary has {vocab_size:,} "
            "tokens: set model.vocab_size to at least the tokenizer's"
        )
    return ""

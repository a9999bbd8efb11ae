"""Checks of what the model is fed: alignment, statistics, order, and the validation split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.data.chat.dataset import ConversationDataset
from equilibrium_mcore.data.chat.examples import Examples
from equilibrium_mcore.data.ledger.dataset import LedgerDataset
from equilibrium_mcore.data.ledger.source import DocumentSlice, SourceDocuments
from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.sanity.verdict import Check, judged, skipped
from equilibrium_mcore.sanity.workbench import Observed
from equilibrium_mcore.training.run_data import build_run_datasets
from equilibrium_mcore.training.setup import Run

ROWS_SHOWN = 12
STATISTICS_SAMPLES = 64  # and documents of each source
LEAST_MARKED = 0.5
# Below these a corpus is usual; above, something went wrong in preprocessing.
MOST_UNKNOWN = 0.01
MOST_IN_VALIDATION_TWICE = 0.05
DOCUMENTS_COMPARED = 20_000


def check_alignment(seen: Observed, tokenizer: Tokenizer | None, *, ended: bool = True) -> Check:
    """labels[i] is tokens[i + 1] and positions count up, in what the model itself was given.

    Where packed documents meet, the label is the next token of neither. `ended`: each document ends
    with the tokenizer's end of document, as those of text do.
    """
    problems: list[str] = []
    eod = tokenizer.eod if tokenizer and ended else None
    for number, given in enumerate(seen.inputs):
        tokens, labels, positions = (
            given[name].cpu() for name in ("input_ids", "labels", "position_ids")
        )
        inside = positions[:, 1:] != 0
        wrong = ((labels[:, :-1] != tokens[:, 1:]) & inside).nonzero()
        if len(wrong):
            row, i = wrong[0].tolist()
            share = len(wrong) / tokens[:, 1:].numel()
            problems.append(
                f"labels[i] is not tokens[i+1] at {share:.0%} of places; micro-batch {number}, row "
                f"{row}, first i={i}: label {labels[row, i]}, next token {tokens[row, i + 1]}"
                f"{_known_mistake(tokens, labels)}"
            )
        problems += _position_problems(positions, tokens, eod, number)
        if problems:
            break
    first = {name: tensor[0].cpu() for name, tensor in seen.inputs[0].items()}
    micro_batches, size = len(seen.inputs), seen.inputs[0]["input_ids"].numel()
    return judged(
        "alignment",
        problems,
        f"labels[i] == tokens[i+1] and positions count up in {micro_batches} micro-batches of "
        f"{size:,} tokens",
        details=_decoded(first, tokenizer),
    )


def _known_mistake(tokens: Tensor, labels: Tensor) -> str:
    if torch.equal(tokens, labels):
        return " (the labels are the tokens themselves: never shifted)"
    if torch.equal(labels[:, :-2], tokens[:, 2:]):
        return " (shifted twice)"
    if torch.equal(labels[:, 1:], tokens[:, :-1]):
        return " (shifted the wrong way)"
    return ""


def _position_problems(
    positions: Tensor, tokens: Tensor, eod: int | None, number: int
) -> list[str]:
    if positions[:, 0].any():
        return [f"positions of micro-batch {number} start at {positions[:, 0].tolist()}, not at 0"]
    steps = positions[:, 1:] - positions[:, :-1]
    reset = positions[:, 1:] == 0
    if eod is not None:  # a document may start again only after the end of another
        reset &= tokens[:, :-1] == eod
    wrong = ((steps != 1) & ~reset).nonzero()
    if not len(wrong):
        return []
    row, i = wrong[0].tolist()
    return [
        f"positions neither count up nor start again after an end of document: micro-batch "
        f"{number}, row {row}, i={i}: {positions[row, i]} is followed by {positions[row, i + 1]}"
    ]


def _decoded(first: dict[str, Tensor], tokenizer: Tokenizer | None) -> list[str]:
    """The first row as a table, from its start and around its first end of document."""
    tokens, labels, positions = (
        first[name].tolist() for name in ("input_ids", "labels", "position_ids")
    )
    places = list(range(min(ROWS_SHOWN, len(tokens))))
    if tokenizer and tokenizer.eod in tokens[ROWS_SHOWN:-2]:
        end = tokens.index(tokenizer.eod, ROWS_SHOWN)
        places += [None, *range(end - 2, end + 3)]
    rows = []
    for i in places:
        if i is None or i >= len(tokens):
            rows.append(("...", "", "", "", "", ""))
            continue
        mark = "" if i + 1 >= len(tokens) or labels[i] == tokens[i + 1] else "  <- not tokens[i+1]"
        token, label = _text(tokenizer, tokens, i), _text(tokenizer, labels, i)
        rows.append((i, positions[i], tokens[i], token, labels[i], label + mark))
    head = ("i", "position", "token", "text", "label", "text")
    lines = terminal_table(head, rows, align="rrrlrl").splitlines()
    if tokenizer:
        lines.append(f"text: {tokenizer.decode(tokens)[:240]!r}")
    return lines


def _text(tokenizer: Tokenizer | None, ids: list[int], i: int) -> str:
    """What token i adds to the text in front of it, quoted."""
    if tokenizer is None:
        return "-"
    if ids[i] == tokenizer.eod:
        return "<end of document>"
    before = tokenizer.decode(ids[max(0, i - 4) : i])
    whole = tokenizer.decode(ids[max(0, i - 4) : i + 1])
    return repr(whole[len(before) :] if whole.startswith(before) else tokenizer.decode([ids[i]]))[
        :16
    ]


def check_batch_statistics(datasets: Datasets, tokenizer: Tokenizer) -> Check:
    """Share of special tokens; how documents end; what is counted."""
    count = min(STATISTICS_SAMPLES, len(datasets.train))
    samples = [datasets.train[i] for i in range(count)]
    tokens = np.concatenate([np.asarray(sample["tokens"]) for sample in samples])
    mask = np.concatenate([np.asarray(sample["loss_mask"]) for sample in samples])
    labels = np.concatenate([np.asarray(sample["labels"]) for sample in samples])

    def share(token: int | None) -> float:
        return float((tokens == token).mean()) if token is not None else 0.0

    # Looked at in the sources: the first samples may hold nothing but beginnings of documents.
    ended = [part for part in parts(datasets.train) if part.ended]
    marked = {part.path: _marked_ends(part, tokenizer.eod) for part in ended}
    figures = {
        "tokens": int(tokens.size),
        "distinct": int(np.unique(tokens).size),
        "end_of_document": share(tokenizer.eod),
        "unknown": share(tokenizer.unk_id),
        "padding": share(tokenizer.pad_id if tokenizer.pad_id != tokenizer.eod else None),
        "counted_in_loss": float(mask.mean()),
        **({"documents_with_end": min(marked.values())} if marked else {}),
    }
    problems = []
    for path, marked_share in marked.items():
        if marked_share < LEAST_MARKED:
            problems.append(
                f"only {marked_share:.0%} of the documents of {path} end with the end-of-document "
                f"token ({tokenizer.eod}): preprocess with --append-eod, or one document runs into "
                "the next unmarked"
            )
    if figures["unknown"] > MOST_UNKNOWN:
        problems.append(
            f"{figures['unknown']:.1%} of tokens are unknown ({tokenizer.unk_id}): another "
            "tokenizer made the data, or it has no byte fallback"
        )
    if figures["counted_in_loss"] < 0.05:
        problems.append(f"the loss counts only {figures['counted_in_loss']:.1%} of tokens")
    if figures["padding"] and mask[labels == tokenizer.pad_id].any():
        problems.append("the loss counts padding as labels: mask it")
    return judged(
        "batch_statistics",
        problems,
        _ends_text(figures)
        + f"of {tokens.size:,} tokens {figures['end_of_document']:.2%} are the end of a document, "
        f"{figures['unknown']:.2%} unknown, {figures['padding']:.2%} padding; "
        f"{figures['counted_in_loss']:.0%} counted; {figures['distinct']:,} distinct",
        figures=figures,
    )


def check_data_order(run: Run) -> Check:
    """Two iterators, a dataset built again, and a resumed iterator give the same batches."""
    batch, compared = run.config.training.global_batch_size, 2 * run.micro_batches

    def ids(dataset: Any, *, consumed: int) -> Iterator[Tensor]:
        stream = run.stream_of(dataset, consumed_samples=consumed)
        return (batch["tokens"] for batch in stream.next_batches(compared))

    first = list(ids(run.datasets.train, consumed=0))
    again = list(ids(run.datasets.train, consumed=0))
    rebuilt = list(ids(build_run_datasets(run.config).train, consumed=0))
    resumed = list(ids(run.datasets.train, consumed=batch))
    problems = []
    for what, other in (("a second iterator", again), ("datasets built again", rebuilt)):
        places = [i for i, pair in enumerate(zip(first, other, strict=True)) if not _same(*pair)]
        if places:
            problems.append(f"{what} gives other tokens from micro-batch {places[0]} on")
    if not all(map(_same, first[run.micro_batches :], resumed[: run.micro_batches])):
        problems.append(
            "a run resumed after one step does not continue with the second global batch"
        )
    rows = torch.cat(first)
    # A second epoch may give what the first one gave.
    held = _sequences_held(run.datasets.train, rows.shape[1], most=len(rows))
    if len(torch.unique(rows, dim=0)) < held:
        problems.append(f"of the first {len(rows)} sequences some are the same")
    return judged(
        "data_order",
        problems,
        f"{compared} micro-batches are the same from a second iterator and from datasets built "
        "again; a resume continues in place",
    )


def _sequences_held(dataset: Any, length: int, *, most: int) -> int:
    """How many sequences of `length` tokens the documents of a split fill, up to `most`."""
    tokens = 0
    for part in parts(dataset):
        for number in part.numbers:
            if tokens >= most * length:
                return most
            tokens += len(part.read(number))
    return tokens // length


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right)


def check_validation_split(datasets: Datasets) -> Check:
    """No document is in both training and validation, by place in the file or word for word."""
    if datasets.validation is None:
        return skipped("validation_split", "data.split leaves nothing for validation")
    problems, train_hashes, validation_hashes = [], set(), []
    sizes = {"train": 0, "validation": 0}
    for train, validation in zip(parts(datasets.train), parts(datasets.validation), strict=True):
        both = range(
            max(train.numbers.start, validation.numbers.start),
            min(train.numbers.stop, validation.numbers.stop),
        )
        if both and train.path == validation.path:
            problems.append(
                f"{len(both):,} documents of {train.path} are in both splits, the first is "
                f"number {both[0]}"
            )
        sizes["train"] += len(train.numbers)
        sizes["validation"] += len(validation.numbers)
        train_hashes |= set(_hashes(train))
        validation_hashes += _hashes(validation)
    twice = float(np.mean([item in train_hashes for item in validation_hashes]))
    if twice > MOST_IN_VALIDATION_TWICE and not problems:
        problems.append(
            f"{twice:.1%} of validation documents are in training word for word (limit "
            f"{MOST_IN_VALIDATION_TWICE:.0%}): remove duplicates before the split"
        )
    return judged(
        "validation_split",
        problems,
        f"{sizes['validation']:,} validation and {sizes['train']:,} training documents, none in "
        f"both; {twice:.1%} of validation is in training word for word",
        figures={**sizes, "share_word_for_word": twice},
    )


def _marked_ends(part: SplitDocuments, eod: int | None) -> float:
    """Share of some documents that end with the end-of-document token; 1 where there is none."""
    numbers = part.numbers[:: -(-len(part.numbers) // STATISTICS_SAMPLES) or 1]
    ends = [document[-1] for document in map(part.read, numbers) if len(document)]
    return float(np.mean([end == eod for end in ends])) if ends and eod is not None else 1.0


def _ends_text(figures: dict[str, Any]) -> str:
    if "documents_with_end" not in figures:
        return ""
    share = figures["documents_with_end"]
    return f"{share:.0%} of documents or more end with the end-of-document token; "


@dataclass(frozen=True)
class SplitDocuments:
    """One source's documents in one split: numbers in the file, which follow each other."""

    path: str
    numbers: range
    read: Callable[[int], np.ndarray]
    ended: bool = True  # whether each should end with the tokenizer's end of document


def _hashes(part: SplitDocuments) -> list[bytes]:
    """A hash of each document of one source's split, of at most DOCUMENTS_COMPARED of them."""
    numbers = part.numbers[:: -(-len(part.numbers) // DOCUMENTS_COMPARED) or 1]
    return [hashlib.md5(part.read(n).tobytes()).digest() for n in numbers]


def parts(dataset: Any) -> list[SplitDocuments]:
    """The sources of a split, whoever orders its documents."""
    if isinstance(dataset, LedgerDataset):
        return [_ledger_part(source) for source in dataset.sources]
    if isinstance(dataset, ConversationDataset):
        return [_conversations_part(dataset.examples)]
    megatron = dataset.dataset
    return [_megatron_part(part) for part in getattr(megatron, "datasets", [megatron])]


def _ledger_part(source: SourceDocuments) -> SplitDocuments:
    return SplitDocuments(
        path=str(source.prefix),
        numbers=range(source.begin, source.end),
        read=lambda n: source.read(DocumentSlice(n, 0, source.length(n))),
    )


def _conversations_part(examples: Examples) -> SplitDocuments:
    ends = np.cumsum(examples.lengths)
    return SplitDocuments(
        path=f"conversations {examples.fingerprint}",
        numbers=range(len(examples)),
        read=lambda n: np.array(examples.ids[ends[n] - examples.lengths[n] : ends[n]]),
        ended=False,
    )


def _megatron_part(part: Any) -> SplitDocuments:
    return SplitDocuments(
        path=part.dataset_path,
        numbers=range(int(part.indices[0]), int(part.indices[-1]) + 1),
        read=lambda n: part.dataset[n],
    )

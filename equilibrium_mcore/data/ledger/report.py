"""What a run consumed, where two runs part, and which documents a step was trained on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.ledger.ledger import Ledger, SamplePlan
from equilibrium_mcore.data.ledger.record import (
    Mark,
    StepInterval,
    ledger_behind,
    plans_at,
    plans_of,
    read_segments,
    segment_of,
)
from equilibrium_mcore.data.ledger.source import DocumentSlice, SourceDocuments
from equilibrium_mcore.data.ledger.trace import readings
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from equilibrium_mcore.files.tables import terminal_table

TEXT_TOKENS = 60  # decoded of a document when its text is shown
TEXT_CHARACTERS = 100
# Of a segment's settings, those that decide which documents come next.
DECISIVE = ("sequence_length", "global_batch_size", "packing", "document_multiple", "seed", "split")


def ledger_report(
    run: Path,
    *,
    step: int | None = None,
    compare: Path | None = None,
    document: str | None = None,
    position: int | None = None,
    count: int = 1,
    show: bool = False,
) -> dict[str, Any]:
    """What `tools/data_ledger.py` prints, as plain values.

    Always `run`, `step`, and per source what was consumed up to it: by default the last saved step,
    else `step`. With `compare` the same of another run, and where the two part. With `step` the
    documents of that step, or with `position` those of `count` samples from it on, trained on or
    left out; with the beginning of their text where `show` is set. With `document`, SOURCE:NUMBER,
    where that document was read. Raises FileNotFoundError, ValueError, and ConfigError for a step
    or a document that is not the run's.
    """
    segments = read_segments(run)
    values: dict[str, Any] = {"run": str(run), **consumption(segments, step)}
    values["changes"] = changes(segments)
    if position is not None:
        values["samples"] = documents_at(segments, position, count, show=show)
    elif step is not None:
        values["samples"] = documents_of_step(segments, step, show=show)
    if document is not None:
        name, _, number = document.rpartition(":")
        if not name or not number.isdecimal():
            raise ConfigError(f"--document {document}: must be SOURCE:NUMBER, e.g. code:4711")
        values["document"] = readings(segments, name, int(number))
    if compare is not None:
        others = read_segments(compare)
        values["other"] = {"run": str(compare), **consumption(others, step)}
        values["parting"] = parting(segments, others)
    return values


# -------------------------------------------------------------------------------- consumption


def consumption(segments: list[StepInterval], step: int | None = None) -> dict[str, Any]:
    """Per source what the run consumed up to `step`; None: up to the last saved state.

    `documents` counts those that were begun, over all epochs; `epochs` is by tokens.
    """
    if step is None:
        mark = segments[-1].marks[-1]
    else:
        segment = segment_of(segments, step)
        samples = segment.first.samples
        samples += (step - segment.first.step) * segment.settings["global_batch_size"]
        mark = Mark(step, samples, ledger_behind(segment, step).state())
    state = mark.state
    total = sum(cursor["tokens"] for cursor in state["cursors"].values())
    return {
        "step": mark.step,
        "sequences": mark.samples,
        "tokens": total,
        "sources": [
            _consumed(name, state["sources"][name], cursor, state["weights"].get(name), total)
            for name, cursor in state["cursors"].items()
        ],
    }


def _consumed(
    name: str, facts: dict[str, Any], cursor: dict[str, Any], weight: float | None, total: int
) -> dict[str, Any]:
    tokens = cursor["tokens"]
    return {
        "name": name,
        "weight": weight,  # None: it left the blend
        "documents": cursor["epoch"] * facts["documents"] + cursor["position"],
        "tokens": tokens,
        "share": tokens / total if total else 0.0,
        "epochs": tokens / facts["tokens"],
        "epoch_documents": facts["documents"],
        "epoch_tokens": facts["tokens"],
    }


def changes(segments: list[StepInterval]) -> list[dict[str, Any]]:
    """Where settings of the data changed on the way: after which step, and what."""
    found = []
    for before, after in pairwise(segments):
        differences = _differences(before.settings, after.settings)
        if differences:
            found.append({"step": after.first.step, "changed": differences})
    return found


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    texts = [
        f"{key} {before[key]} -> {after[key]}" for key in DECISIVE if before[key] != after[key]
    ]
    old, new = ({s["name"]: s["weight"] for s in v["sources"]} for v in (before, after))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            texts.append(f"weight of {name} {old.get(name, 'none')} -> {new.get(name, 'none')}")
    return texts


# -------------------------------------------------------------------------------- comparison


def parting(ours: list[StepInterval], theirs: list[StepInterval]) -> dict[str, Any] | None:
    """The first step in which two runs take other documents, and why; None where they never do.

    Two ledgers with equal states and settings take the same documents until settings change, so
    only the steps are looked at after which one of the runs started or changed.
    """
    starts = sorted({segment.first.step for segment in (*ours, *theirs)})
    shared = max(ours[0].first.step, theirs[0].first.step)
    for start in [step for step in starts if step >= shared]:
        step = start + 1
        try:
            left, right = segment_of(ours, step), segment_of(theirs, step)
        except ConfigError:  # one of the runs is shorter
            return None
        reasons = _differences(left.settings, right.settings)
        one, other = (_state_behind(segment, start) for segment in (left, right))
        reasons += _state_differences(one, other)
        if reasons:
            return {"step": step, "because": reasons}
    return None


def _state_behind(segment: StepInterval, step: int) -> dict[str, Any]:
    mark = segment.mark_before(step)
    return mark.state if mark.step == step else ledger_behind(segment, step).state()


def _state_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    texts = []
    for name in {**one["cursors"], **other["cursors"]}:
        facts = [state["sources"].get(name, {}).get("fingerprint") for state in (one, other)]
        if facts[0] != facts[1]:
            texts.append(f"{name} is other data: fingerprints {facts[0]} and {facts[1]}")
            continue
        places = [state["cursors"].get(name) for state in (one, other)]
        if places[0] != places[1]:
            texts.append(f"{name} stands at {' and at '.join(map(_place, places))}")
    return texts


def _place(cursor: dict[str, Any] | None) -> str:
    if cursor is None:
        return "its first document"
    return (
        f"epoch {cursor['epoch']}, position {cursor['position']:,}, {cursor['tokens']:,} tokens "
        f"read, {len(cursor['held'])} documents under way"
    )


# -------------------------------------------------------------------------------- a step's text


def documents_of_step(
    segments: list[StepInterval], step: int, *, show: bool = False
) -> list[dict[str, Any]]:
    """The samples of a step, each with its source and the documents it is made of.

    `offset` is the first token taken of the document, `tokens` how many, `of` how many it has.
    """
    segment = segment_of(segments, step)
    return _described(segment, *plans_of(segment, step), show=show)


def documents_at(
    segments: list[StepInterval], position: int, count: int, *, show: bool = False
) -> list[dict[str, Any]]:
    """The same of samples by their position in the data, trained on or left out."""
    return _described(*plans_at(segments, position, count), show=show)


def _described(
    segment: StepInterval, ledger: Ledger, plans: list[SamplePlan], *, show: bool
) -> list[dict[str, Any]]:
    tokenizer = None
    if show:
        tokenizer = load_tokenizer(TokenizerConfig(**_with_path(segment.settings["tokenizer"])))
    samples = []
    for number, plan in enumerate(plans):
        source = ledger.sources[plan.source]
        documents = [_document(source, span, tokenizer) for span in plan.spans]
        samples.append({"sample": number, "source": source.name, "documents": documents})
    return samples


def _with_path(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "model": Path(values["model"])}


def _document(
    source: SourceDocuments, span: DocumentSlice, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "document": span.document,
        "offset": span.offset,
        "tokens": span.tokens,
        "of": source.length(span.document),
    }
    if tokenizer is not None:
        ids = source.read(DocumentSlice(span.document, span.offset, min(span.tokens, TEXT_TOKENS)))
        values["text"] = tokenizer.decode(ids.tolist())[:TEXT_CHARACTERS]
    return values


# ------------------------------------------------------------------------------------- as text


def as_text(values: dict[str, Any]) -> str:
    """The values of `ledger_report` for people."""
    parts = [_consumption_text(values)]
    if values["changes"]:
        lines = [f"  after step {c['step']}: {', '.join(c['changed'])}" for c in values["changes"]]
        parts.append("\n".join(["changed on the way:", *lines]))
    if "document" in values:
        parts.append(_readings_text(values["document"]))
    if "other" in values:
        parts.append(_consumption_text(values["other"]))
        parting_at = values["parting"]
        if parting_at is None:
            parts.append("both take the same documents, as long as both go")
        else:
            reasons = "\n".join(f"  {reason}" for reason in parting_at["because"])
            parts.append(f"the documents differ from step {parting_at['step']} on:\n{reasons}")
    if "samples" in values:
        parts.append(_samples_text(values))
    return "\n\n".join(parts)


def _consumption_text(values: dict[str, Any]) -> str:
    head = ("source", "weight", "documents", "tokens", "share", "epochs", "documents there")
    rows = [
        (
            source["name"],
            "none" if source["weight"] is None else f"{source['weight']:.4f}",
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{source['share']:.4f}",
            f"{source['epochs']:.4f}",
            f"{source['epoch_documents']:,}",
        )
        for source in values["sources"]
    ]
    title = (
        f"{values['run']}: {values['tokens']:,} tokens in {values['sequences']:,} sequences, "
        f"{values['step']:,} steps"
    )
    return f"{title}\n{terminal_table(head, rows, align='lr')}"


def _readings_text(values: dict[str, Any]) -> str:
    head = f"document {values['document']:,} of {values['source']}, {values['tokens']:,} tokens"
    if not values["read"]:
        return f"{head}: not read up to the last saved step"
    lines = [
        f"  step {piece['step']:,}, sample {piece['sample']}: tokens {piece['offset']} to "
        f"{piece['offset'] + piece['tokens'] - 1} (epoch {piece['epoch']})"
        for piece in values["read"]
    ]
    return "\n".join([f"{head}, was read in", *lines])


def _samples_text(values: dict[str, Any]) -> str:
    lines = [f"step {values['step']}: document, its tokens, of how many"]
    for sample in values["samples"]:
        for place, document in enumerate(sample["documents"]):
            name = f"{sample['sample']:>5} {sample['source']}" if place == 0 else ""
            first = document["offset"]
            line = (
                f"{name:<24} {document['document']:>10}  {first}..{first + document['tokens'] - 1}"
                f" of {document['of']}"
            )
            lines.append(f"{line}  {document['text']!r}" if "text" in document else line)
    return "\n".join(lines)

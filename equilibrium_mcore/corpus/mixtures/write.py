"""The files of a prepared mixture, under temporary names until all of them are whole."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from equilibrium_mcore.config.data import DataConfig, SourceConfig
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.config.yaml_io import to_yaml
from equilibrium_mcore.corpus.encode import EncoderPlan
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.corpus.mixtures.manifest import OutputFacts, SourceFacts
from equilibrium_mcore.corpus.mixtures.merge import (
    Chosen,
    CurriculumStages,
    Output,
    outputs_of,
    write_output,
)
from equilibrium_mcore.corpus.mixtures.plan import MixturePlan
from equilibrium_mcore.data.indexed_files import Manifest
from equilibrium_mcore.files.named import open_named
from equilibrium_mcore.files.whole import partial_path, rename_durably, sync_stream

# By a mixture's kind: the file that a run names as `data:`, and what its data is.
DATA_FILES = {
    "conversation": ("conversations.yaml", "conversations"),
    "preference": ("preferences.yaml", "preferences"),
    "prompt": ("prompts.yaml", "prompts"),
}


class OutputSet:
    """Writes one dataset after the other; `publish` gives all of them their final names."""

    def __init__(self, folder: Path, encoder: EncoderPlan | None) -> None:
        self.folder = folder
        self.encoder = encoder
        self._stack = ExitStack()
        self._writers: list[IndexedWriter] = []
        self._lines: list[_LinesWriter] = []

    def __enter__(self) -> OutputSet:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def write(self, chosen: Chosen, split: str, inputs: list[dict[str, Any]]) -> list[OutputFacts]:
        """Write a source, or each stage of its curriculum."""
        stages = CurriculumStages(chosen)
        return [self._write_one(stages, output, inputs) for output in outputs_of(stages, split)]

    def publish(self) -> None:
        """Rename into place, each dataset as a whole."""
        for writer in self._writers:
            writer.publish()
        for lines in self._lines:
            lines.publish()

    def _write_one(
        self, stages: CurriculumStages, output: Output, inputs: list[dict[str, Any]]
    ) -> OutputFacts:
        name = stages.chosen.spec.dataset.name
        stem = name if output.stage is None else f"{name}_stage{output.stage}"
        if self.encoder is None:
            prefix = f"data/{stem}"
            lines = self._stack.enter_context(_LinesWriter(self.folder / prefix))
            written = write_output(stages, output, lines.add)
            lines.finish()
            self._lines.append(lines)
        else:
            prefix = f"data/{stem}_text_document"
            writer = self._stack.enter_context(
                IndexedWriter(self.folder / prefix, self.encoder.dtype.type, overwrite=True)
            )
            written = write_output(stages, output, lambda p, n, _: writer.add(p, n))
            writer.finish()
            bad = stages.chosen.counts["bad"]
            writer.stage(_manifest(writer, self.encoder, stages, bad, inputs))
            self._writers.append(writer)
        held_out = output.validation_documents
        return OutputFacts(
            prefix=prefix,
            stage=output.stage,
            documents=output.documents,
            tokens=output.tokens,
            train_documents=output.documents - held_out,
            validation_documents=held_out,
            low=output.low,
            high=output.high,
            **written,
        )


class _LinesWriter:
    """PREFIX.train.jsonl and PREFIX.validation.jsonl, under temporary names until published."""

    def __init__(self, prefix: Path) -> None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._final = {
            held_out: prefix.with_name(f"{prefix.name}.{split}.jsonl")
            for held_out, split in ((False, "train"), (True, "validation"))
        }
        self._files: dict[bool, IO[bytes]] = {
            # Not whole: published with the other datasets, by `publish`.
            held_out: open_named(partial_path(path), "wb")
            for held_out, path in self._final.items()
        }

    def __enter__(self) -> _LinesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for held_out, path in self._final.items():
            self._files[held_out].close()
            partial_path(path).unlink(missing_ok=True)

    def add(self, payload: bytes, lengths: np.ndarray, held_out: bool) -> None:
        """Append lines."""
        self._files[held_out].write(payload)

    def finish(self) -> None:
        """Everything to disk."""
        for file in self._files.values():
            sync_stream(file)

    def publish(self) -> None:
        """Rename into place."""
        for path in self._final.values():
            rename_durably(partial_path(path), path)


def blend_texts(
    plan: MixturePlan, facts: list[SourceFacts], output: Path, split: str
) -> dict[str, str]:
    """File name to YAML of the blends: one, or one per stage of a curriculum.

    A dataset without a curriculum is whole in every stage's blend.
    """
    count = max(len(source.outputs) for source in facts)
    texts = {}
    for stage in range(1, count + 1):
        sources = []
        for source in facts:
            place = source.outputs[stage - 1 if len(source.outputs) > 1 else 0]
            sources.append(
                SourceConfig(
                    name=source.name if place.stage is None else f"{source.name}_stage{stage}",
                    prefix=output / place.prefix,
                    weight=source.share,
                    # A stage is a part of a run; what it needs of its data, its steps decide.
                    max_epochs=source.max_epochs if count == 1 else None,
                )
            )
        mixture = plan.mixture
        name = mixture.name if count == 1 else f"{mixture.name}_stage{stage}"
        blend = DataConfig(name=name, tokenizer=mixture.tokenizer, sources=sources, split=split)
        wanted = blend.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        head = f"# Written by tools/prepare_dataset.py from the mixture {mixture.name}.\n"
        if count > 1:
            head += f"# Stage {stage} of {count}: train on it after the stages before it.\n"
        file = "blend.yaml" if count == 1 else f"blend_stage{stage}.yaml"
        texts[file] = head + to_yaml(wanted)
    return texts


def conversation_texts(plan: MixturePlan, facts: list[SourceFacts], output: Path) -> dict[str, str]:
    """File name to YAML of conversations, or pairs, that a run names as `data:`; a source a dataset

    A curriculum's stages are files of one source. Without a tokenizer of the mixture's there is
    none in it: the run names it. Other phases have no such file.
    """
    mixture = plan.mixture
    if mixture.kind not in DATA_FILES:
        return {}
    file, kind = DATA_FILES[mixture.kind]
    values: dict[str, Any] = {"type": kind, "name": mixture.name}
    if mixture.tokenizer is not None:
        values["tokenizer"] = mixture.tokenizer.model_dump(mode="json", exclude_none=True)
    values["sources"] = [_conversation_source(source, output) for source in facts]
    values["template"] = "chatml"
    head = f"# Written by tools/prepare_dataset.py from the mixture {mixture.name}.\n"
    if not _has_truths(mixture):
        values["truth"] = None
        head += "# No truths: for stage rlaif, where a judge compares answers.\n"
    return {file: head + to_yaml(values)}


def _has_truths(mixture: MixtureConfig) -> bool:
    """Whether every prompt says what an answer is judged by; of other kinds it is not asked."""
    return mixture.kind != "prompt" or all(dataset.columns.truth for dataset in mixture.datasets)


def _conversation_source(source: SourceFacts, output: Path) -> dict[str, Any]:
    def files(split: str, documents: str) -> list[str]:
        held = [place.prefix for place in source.outputs if getattr(place, documents)]
        return [str(output / f"{prefix}.{split}.jsonl") for prefix in held]

    return {
        "name": source.name,
        "train": files("train", "train_documents"),
        "validation": files("validation", "validation_documents"),
    }


def _manifest(
    writer: IndexedWriter,
    encoder: EncoderPlan,
    stages: CurriculumStages,
    bad: int,
    inputs: list[dict[str, Any]],
) -> Manifest:
    dataset = stages.chosen.spec.dataset
    return Manifest(
        tokenizer_type=encoder.kind,
        tokenizer_sha256=encoder.fingerprint,
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        append_eod=True,
        key=dataset.text_template or dataset.columns.messages or dataset.text_field,
        documents=writer.documents,
        tokens=writer.tokens,
        largest_token=writer.largest_token,
        dtype=writer.dtype.name,
        skipped_lines=bad,
        inputs=inputs,
    )

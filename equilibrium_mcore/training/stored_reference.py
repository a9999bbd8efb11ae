"""A reference that is computed once and kept in files, so that a run needs no second model.

    DIRECTORY/train/log_p.npy        float32, for every token of the encoded examples its log p
    DIRECTORY/train/facts.json       of which weights, examples and packing; written last
    DIRECTORY/validation/...         the same of the held-out part

The numbers are those that a live reference computes but for rounding: an example is scored in
another pack here than in most of a run's batches, so sums have other neighbours in a tile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.checkpoint.choose import find_weights
from equilibrium_mcore.checkpoint.opened import inspect
from equilibrium_mcore.checkpoint.together import on_first_rank
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.chat.answers import AnswerDataset
from equilibrium_mcore.data.chat.order import SequencePlan
from equilibrium_mcore.data.chat.unpaired import UnpairedDataset
from equilibrium_mcore.data.left_out import RemainingSamples
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.files.whole import whole_file, write_whole
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.processes.console import say
from equilibrium_mcore.training.mismatched import mismatched
from equilibrium_mcore.training.pairs import REFERENCE
from equilibrium_mcore.training.reference import Reference
from equilibrium_mcore.training.setup import Run

VALUES_FILE, FACTS_FILE = "log_p.npy", "facts.json"
FORMAT = 1
SLICE = 1 << 24  # values that are summed over ranks at a time


class StoredReference:
    """Puts what was stored of a reference into batches: a `Run.prepare`.

    Made together by all ranks; computes what is not stored yet, with the run's own weights where it
    has made no step, and else with a frozen copy that is then let go.

    Raises ConfigError where files are there that are of other weights, data or packing.
    """

    def __init__(self, run: Run) -> None:
        folder = run.config.objective.reference_directory
        folder = folder or run.config.output_directory / "reference"
        parts = {"train": run.datasets.train, "validation": run.datasets.validation}
        self._values: list[tuple[int, np.ndarray]] = []
        for part, dataset in parts.items():
            if dataset is not None:
                answers = _answers_of(dataset)
                values = _load_or_make(run, answers, folder / part)
                self._values.append((answers.first_place, values))

    def __call__(self, run: Run, batches: list[Batch]) -> None:
        """Fill `reference` [B, S] of every batch; 0 where no example's token is predicted."""
        for batch in batches:
            place = batch["label_place"].numpy()
            values = np.zeros(place.shape, np.float32)
            for first, stored in self._values:
                here = (place >= first) & (place < first + len(stored))
                values[here] = stored[place[here] - first]
            batch[REFERENCE] = torch.from_numpy(values)


def _answers_of(dataset: Samples) -> AnswerDataset:
    dataset = dataset.dataset if isinstance(dataset, RemainingSamples) else dataset
    assert isinstance(dataset, AnswerDataset)
    return dataset


def _load_or_make(run: Run, dataset: AnswerDataset, folder: Path) -> np.ndarray:
    """The stored values, mapped. Collective. Raises ConfigError."""
    facts = on_first_rank(lambda: _facts(run.config, dataset))
    if not on_first_rank(lambda: _is_there(folder, facts)):
        _make(run, dataset, folder, facts)
    return np.load(folder / VALUES_FILE, mmap_mode="r")


def _facts(config: RunConfig, dataset: AnswerDataset) -> dict[str, Any]:
    """What the values are of, as plain values."""
    opened = inspect(find_weights(config.checkpoint.initial_weights), needs_state=False)
    if opened.files is None:
        raise ConfigError(
            f"objective.reference=stored with {opened.path}, which has no manifest, so nothing "
            "could tell whether its weights change: use objective.reference=live"
        )
    files = json.dumps({n: f["sha256"] for n, f in sorted(opened.data_files.items())})
    model = config.model
    return {
        "format": FORMAT,
        "weights": hashlib.sha256(files.encode()).hexdigest(),
        "data": dataset.examples.fingerprint,
        "template": json.loads(config.data.model_dump_json(include={"template"}))["template"],
        "packing": dataset.packing._asdict(),
        "precision": config.training.precision,
        "vocabulary": [model.vocab_size, model.padded_vocab_size],
    }


def _is_there(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the folder holds values of these facts. Raises ConfigError for those of others."""
    path = folder / FACTS_FILE
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        length = len(np.load(folder / VALUES_FILE, mmap_mode="r"))
        changed = sorted(k for k in {*facts, *found} if k != "tokens" and facts.get(k) != found[k])
        damaged = "" if length == found["tokens"] else f"{length:,} values, not {found['tokens']:,}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        changed, damaged = [], f"cannot be read: {type(error).__name__}: {error}"
    if not changed and not damaged:
        return True
    what = damaged or f"of another {' and '.join(changed)}"
    raise ConfigError(
        f"objective.reference=stored: what is stored in {folder} is {what}: put back what it was "
        "made of, name another objective.reference_directory, or remove the folder to have it made "
        "again"
    )


# ------------------------------------------------------------------------------------- making


def _make(run: Run, dataset: AnswerDataset, folder: Path, facts: dict[str, Any]) -> None:
    """Compute the values of all examples and write them. Collective."""
    if run.is_first_rank:
        say(f"reference: computing {len(dataset.examples):,} examples for {folder}")
    found = _scored(run, dataset, _live(run))
    if run.is_first_rank:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / VALUES_FILE, "wb") as stream:
            np.save(stream, found)
        facts = {**facts, "tokens": len(found)}
        write_whole(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
    torch.distributed.barrier()


def _live(run: Run) -> Any:
    """Something with `scores`: the run before its first step is its own reference."""
    if run.progress.step == 0 and run.config.adapters is None:
        return _Itself()
    return Reference(run)


class _Itself:
    def scores(self, run: Run, batches: list[Batch]) -> list[torch.Tensor]:
        from equilibrium_mcore.training.scoring import log_probabilities

        return log_probabilities(run, batches, padded_vocabulary=True)


def _scored(run: Run, dataset: AnswerDataset, reference: Any) -> np.ndarray:
    """float32[tokens of the examples], the same on every rank. Collective.

    Each data rank scores its part of the sequences; a token is scored by one of them.
    """
    values = np.zeros(len(dataset.examples.ids), np.float32)
    for batches in _batches(run, dataset):
        if isinstance(dataset, UnpairedDataset):
            batches = [both for batch in batches for both in (batch, mismatched(batch))]
        for batch, scores in zip(batches, reference.scores(run, batches), strict=True):
            place = batch["label_place"].numpy()
            here = place >= 0
            values[place[here] - dataset.first_place] = scores.float().cpu().numpy()[here]
    for start in range(0, len(values), SLICE):
        part = torch.from_numpy(values[start : start + SLICE])
        summed = part.to(accelerator.device())
        torch.distributed.all_reduce(summed, group=run.groups.dp)
        part.copy_(summed)
    return values


def _batches(run: Run, dataset: AnswerDataset) -> Iterator[list[Batch]]:
    """This data rank's micro-batches, a step's worth at a time; as many on every rank."""
    size = run.config.training.micro_batch_size
    ranks, rank = run.groups.dp.size(), run.groups.dp.rank()
    together = size * ranks * run.micro_batches
    for plans in batched(dataset.plans_in_order(), together):
        filled = [*plans, *[SequencePlan(0, ())] * (together - len(plans))]
        mine = filled[rank * size * run.micro_batches :][: size * run.micro_batches]
        samples = [dataset[plan] for plan in mine]
        yield [
            {name: torch.stack([sample[name] for sample in group]) for name in group[0]}
            for group in batched(samples, size)
        ]

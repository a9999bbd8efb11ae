"""A blend of indexed datasets as samples for train, validation and test.

Documents are cut into the three splits by their place in the file, joined in a shuffled order, and
cut into samples of `sequence_length` tokens and one more for the labels. With `order: ledger` the
order is a cursor per source (`data/ledger/`). With `order: megatron` it is megatron-core's
GPTDataset, for comparison: a stream without resets, whose index of samples rank 0 builds and the
other ranks read from a cache.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.indexed_files import dataset_paths, read_header, tokens_before
from equilibrium_mcore.data.ledger.dataset import build_ledger_dataset
from equilibrium_mcore.data.samples import NumberedSamples, Samples
from equilibrium_mcore.data.sources import SPLITS, check_sources, split_documents
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer

# megatron-core builds this share of samples more per source than the blend should need.
SMALLEST_SURPLUS = 0.005


@dataclass(frozen=True)
class Datasets:
    """The three splits; None where no samples were asked for. Unpacks in this order."""

    train: Samples | None
    validation: Samples | None
    test: Samples | None

    def __iter__(self):
        return iter((self.train, self.validation, self.test))


def build_datasets(
    data: DataConfig,
    *,
    sequence_length: int,
    train_samples: int,
    validation_samples: int,
    test_samples: int = 0,
    seed: int,
    tokenizer: Tokenizer | None = None,
    model_vocab_size: int | None = None,
    ledger_state: dict[str, Any] | None = None,
    consumed_samples: int = 0,
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> Datasets:
    """Train, validation and test datasets with at least the samples asked for.

    A sample is a dict of int64 `tokens`, `labels`, `position_ids` and float32 `loss_mask`, each
    [sequence_length], and its source's place in the blend as `dataset_id` (under `order: megatron`
    only in a blend of several sources). A run that resumes gives the ledger's state and the samples
    after it. Under `order: megatron` the order depends on the number of training samples, so a
    resumed run asks for the same number; and all ranks call this together when torch.distributed
    is initialised, over any backend. Raises ConfigError for data that cannot be trained on.
    """
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    samples = dict(zip(SPLITS, (train_samples, validation_samples, test_samples), strict=True))
    headers = check_sources(
        data,
        tokenizer=tokenizer,
        model_vocab_size=model_vocab_size,
        needed=samples,
        seed=f"{seed} {consumed_samples}",  # other blocks at each resume
        say=_say if _is_first_rank() else lambda text: None,
    )
    if data.order == "ledger":
        goes_on = {"state": ledger_state, "first_sample": consumed_samples}
        parts = {
            part: build_ledger_dataset(
                data,
                part,
                headers,
                sequence_length=sequence_length,
                samples=count,
                seed=seed,
                vocab_size=model_vocab_size or tokenizer.vocab_size,
                **(goes_on if part == "train" else {}),
            )
            if count
            else None
            for part, count in samples.items()
        }
        return Datasets(**parts)
    return _megatron_datasets(
        data,
        samples,
        is_built_on_rank=is_built_on_rank,
        random_seed=seed,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
    )


def epoch_tokens(data: DataConfig) -> int:
    """Tokens of the training split of all sources. Raises ConfigError for files not to be read."""
    problems, total = [], 0
    for source in data.sources:
        try:
            header = read_header(source.prefix)
            bounds = split_documents(data.split, header.sequences)[0]
            begin, end = tokens_before(source.prefix, header, list(bounds))
            total += end - begin
        except (ValueError, OSError) as error:
            problems.append(f"data source {source.name!r}: {error}")
    if problems:
        raise ConfigError(problems, source=f"data {data.name!r}")
    return total


def _megatron_datasets(data: DataConfig, samples: dict[str, int], **settings: Any) -> Datasets:
    cache = cache_directory(data)
    if _is_first_rank():
        _remove_cut_short(cache)
    built = {
        split: NumberedSamples(_build_split(data, split, count, cache=cache, **settings))
        if count
        else None
        for split, count in samples.items()
    }
    return Datasets(**built)


def cache_directory(data: DataConfig) -> Path:
    """Where the blend's index caches go: a folder that changes when the datasets change.

    megatron-core names a cache by the dataset's path and its settings, not by its contents, and
    would use the old one for a dataset that was made again.
    """
    root = data.cache_directory or data.sources[0].prefix.parent / "index_cache"
    state = hashlib.sha256()
    for source in data.sources:
        for path in dataset_paths(source.prefix)[:2]:
            facts = path.stat()
            state.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return Path(root) / state.hexdigest()[:16]


def _build_split(
    data: DataConfig,
    split: str,
    count: int,
    *,
    cache: Path,
    is_built_on_rank: Callable[[], bool],
    **settings: Any,
):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from equilibrium_mcore.data.megatron_files import CheckedGPTDataset

    _require_index_helper()
    prefixes = [str(source.prefix) for source in data.sources]
    weights = [source.weight for source in data.sources]
    config = GPTDatasetConfig(
        blend=(prefixes, weights if len(prefixes) > 1 else None),
        split=data.split,
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # Each source's samples are rounded up, which makes the blend up to one sample per source
        # longer than asked; then a source may have to give this much more than its own share.
        mid_level_dataset_surplus=max(SMALLEST_SURPLUS, (len(prefixes) + 1) / count),
        **settings,
    )
    # One split at a time, since the surplus of a short validation split is far too much for
    # training; the bounds of the split stay those of `data.split`.
    place = SPLITS.index(split)
    config.split_matrix = [
        bounds if i == place else None for i, bounds in enumerate(config.split_matrix)
    ]
    sizes = [count if i == place else 0 for i in range(len(SPLITS))]
    builder = BlendedMegatronDatasetBuilder(CheckedGPTDataset, sizes, is_built_on_rank, config)
    return builder.build()[place]


def _require_index_helper() -> None:
    from megatron.core import datasets

    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError as error:
        folder = datasets.__path__[0]
        raise RuntimeError(
            f"megatron-core's C++ index helper cannot be loaded ({error}). Its wheels hold it "
            f"built; for this installation build it once with `make -C {folder}` (needs make, "
            f"g++ and pybind11), or install megatron-core from its wheel"
        ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _is_first_rank() -> bool:
    distributed = torch.distributed
    return (
        not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_rank() == 0
    )


def _remove_cut_short(cache: Path) -> None:
    """Remove index files that a killed run left half-written; megatron-core builds them again."""
    for path in cache.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            path.unlink(missing_ok=True)

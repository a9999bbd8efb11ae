"""Learning from what a teacher said before: its likeliest ids, read from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.checkpoint.manifest import shares, wrong_hashes
from equilibrium_mcore.checkpoint.together import on_every_rank, on_first_rank
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.objectives.distillation import TopK
from equilibrium_mcore.training.distillation import TEACHER, OfTokens, Slice
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.target_files import (
    TargetRows,
    check_files,
    check_stored_targets,
    damaged,
    row_type,
    sample_keys,
)


@dataclass(frozen=True)
class LikeliestIds:
    """What a teacher said of a whole micro-batch: a row of the files for each of its samples."""

    samples: list[np.ndarray]

    def of(self, batch: Batch, rows: Slice) -> OfTokens:
        """See Said. Reads the rank's part of the files."""
        place = batch["place"].flatten()
        mine = place.cpu()
        ids, log_q = (self._joined(name)[mine].to(place.device) for name in ("ids", "log_q"))
        places = ids.long() - rows.first
        return lambda tokens: TopK(places[tokens], log_q[tokens])

    def _joined(self, name: str) -> Tensor:
        """[B * S, K] or [B * S, K + 1]"""
        return torch.from_numpy(np.concatenate([row[name] for row in self.samples]))


class StoredTargets:
    """A `Run.prepare`: reads what was stored of each sample. Made together by all ranks."""

    def __init__(self, run: Run) -> None:
        """Raises ConfigError for targets of other settings, another teacher, or damaged ones."""
        config = run.config
        folder = self._folder = Path(config.objective.targets)
        on_first_rank(lambda: check_stored_targets(config))
        files = check_files(folder)
        if config.checkpoint.verify:
            mine = shares(files, torch.distributed.get_world_size())[torch.distributed.get_rank()]
            found = on_every_rank(lambda: wrong_hashes(folder, files, mine))
            if damages := [damage for some in found for damage in some]:
                raise damaged(folder, damages)
        dtype = row_type(config.training.sequence_length, config.objective.top_k)
        self._rows = TargetRows(folder, [n for n in sorted(files) if n.endswith(".npy")], dtype)

    def __call__(self, run: Run, batches: list[Batch]) -> None:
        """Let every batch carry it. Raises ConfigError for a sample that nothing is stored of."""
        for batch in batches:
            found = [self._rows.find(int(key)) for key in sample_keys(batch)]
            if any(row is None for row in found):
                raise ConfigError(
                    "a sample of this run has no targets: its data, order, packing or template is "
                    "another, or it is longer than the run that they were made for; make targets "
                    "for this run in another folder",
                    source=f"objective.targets={self._folder}",
                )
            batch[TEACHER] = LikeliestIds(found)

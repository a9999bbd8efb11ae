"""How far a policy has moved from its reference, by mismatched answers: KTO's z."""

from __future__ import annotations

import torch

from equilibrium_mcore.data.chat.unpaired import OTHER
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.pairs import REFERENCE
from equilibrium_mcore.training.reference import Prepare
from equilibrium_mcore.training.scoring import log_probabilities
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.single_answers import KL


class Mismatched:
    """Lets a reference score batches, and puts z into them: a `Run.prepare`.

    z is the mean over all mismatched answers of all batches of all data ranks, however they are
    cut into micro-batches, of the log ratio of policy and reference, and at least 0. The policy is
    what it is before the step; no gradient flows.
    """

    def __init__(self, reference: Prepare) -> None:
        self._reference = reference

    def __call__(self, run: Run, batches: list[Batch]) -> None:
        """Fill `reference` and `kl` [B, S] of every batch. Collective."""
        self._reference(run, batches)
        others = [mismatched(batch) for batch in batches]
        self._reference(run, others)
        policy = log_probabilities(run, others, padded_vocabulary=True)
        total = torch.zeros(2, dtype=torch.float64)
        for batch, log_p in zip(others, policy, strict=True):
            counts = batch["answer"] > 0
            total[0] += ((log_p.cpu() - batch[REFERENCE]).double() * counts).sum()
            total[1] += batch["answer"].amax(dim=1).sum()
        total = total.to(accelerator.device())
        torch.distributed.all_reduce(total, group=run.groups.dp)
        z = max(0.0, (total[0] / total[1]).item())
        for batch in batches:
            batch[KL] = torch.full(batch["labels"].shape, z, dtype=torch.float64)


def mismatched(batch: Batch) -> Batch:
    """The mismatched answers of a batch of `UnpairedDataset`, as a batch of their own."""
    return {
        name.removeprefix(OTHER): value for name, value in batch.items() if name.startswith(OTHER)
    }

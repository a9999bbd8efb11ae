"""An objective of whole documents, which is no stage's, and the faults that such ones have.

Documents of a micro-batch are compared two by two, as preferences are: the first of a pair should
be likelier, token by token, than the second. That is not linear in the losses, so a document's sum
crosses context ranks first, and what it divides by is pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LikelierDocument:
    """-log sigmoid(mean loss of the second - mean loss of the first); the mean over all pairs."""

    figures = ("loss", "margin")
    tokens_of = "loss"
    has_perplexity = False
    reads = "losses"
    carried = ()
    inputs = ("document", "documents", "weight")

    def weigh(self, batch: dict[str, Tensor]) -> float:
        """Each token's document, how many there are, and 1 / counted tokens of its document."""
        from equilibrium_mcore.objectives import reduction

        mask, positions = batch["loss_mask"], batch["position_ids"]
        batch["document"] = reduction.document_numbers(positions)
        count = int(batch["document"].max()) // 2 * 2 + 2
        batch["documents"] = torch.full_like(positions, count)
        batch["weight"] = reduction.sequence_mean(mask, positions, None)[0]
        return count / 2

    def __call__(self, losses: Tensor, batch: dict[str, Tensor], *, cp_group: Any) -> Any:
        """See Objective."""
        from equilibrium_mcore.training import objective

        losses = losses.reshape(-1)
        mask = batch["loss_mask"].reshape(-1).to(losses.dtype)
        weight = batch["weight"].reshape(-1).to(losses.dtype)
        sums = losses.new_zeros(int(batch["documents"].max()))
        sums = sums.index_add(0, batch["document"].reshape(-1), losses * weight)
        means = objective.summed_over_context(sums, cp_group).view(-1, 2)
        margins = means[:, 1] - means[:, 0]
        figures = {
            "loss": ((losses * mask).sum().detach(), mask.sum()),
            # Every context rank has all pairs.
            "margin": (
                margins.sum().detach() / cp_group.size(),
                losses.new_tensor(len(margins) / cp_group.size()),
            ),
        }
        return objective.ObjectiveOutput(-torch.nn.functional.logsigmoid(margins).sum(), figures)


def pairs() -> None:
    """Nothing is broken: the objective of pairs takes the place of the run's."""
    from equilibrium_mcore.training import setup

    setup.build_objective = lambda settings: LikelierDocument()


def pairs_not_summed_over_context() -> None:
    """A context rank takes its part of a document for the whole."""
    from equilibrium_mcore.training import objective

    pairs()
    objective.summed_over_context = lambda values, group: values


def pairs_given_as_the_divisor() -> None:
    """megatron-core is told pairs instead of positions, and its balancing losses weigh more."""
    from equilibrium_mcore.training import step

    pairs()
    right = step.objective_of

    def broken(losses, *, batch, run, scale):
        total, positions, figures = right(losses, batch=batch, run=run, scale=1.0)
        if "documents" not in batch:  # another objective
            return right(losses, batch=batch, run=run, scale=scale)
        ranks = run.groups.cp.size() * run.groups.tp.size()
        count = max(1, int(batch["documents"].max()) // 2 // ranks)
        return total, torch.full_like(positions, count), figures

    step.objective_of = broken


def slices_of_the_vocabulary_taken_for_the_whole() -> None:
    """Each tensor rank's softmax is of its own rows alone."""
    from equilibrium_mcore.objectives.distillation import WHOLE
    from equilibrium_mcore.training import distillation

    distillation.across_ranks = lambda tp_group: WHOLE


def ratios_of_a_part_of_an_answer() -> None:
    """A context rank takes the mean log ratio of its part of an answer for the whole's."""
    from equilibrium_mcore.training import policy_objective

    policy_objective.summed_over_context = lambda values, cp_group: values


def mask_shifted_by_one() -> None:
    """The loss counts the token after each answer's, and not its first: wrong in every layout."""
    from equilibrium_mcore.training import step

    right = step._scale

    def broken(run, batches):
        for batch in batches:
            batch["loss_mask"] = batch["loss_mask"].roll(1, dims=1)
        return right(run, batches)

    step._scale = broken

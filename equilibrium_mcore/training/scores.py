"""The objective of a reward model: the score of an answer is the value at its last token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equilibrium_mcore.config.objectives import RewardModelConfig
from equilibrium_mcore.objectives.pairwise import bradley_terry
from equilibrium_mcore.training.objective import Batch, ObjectiveOutput
from equilibrium_mcore.training.pairs import number_answers, sums_of_answers

MARGIN = "margin"  # of a batch: how much better a chosen answer is, at its positions
LAST = "last_token_of"  # of a batch: the number of the answer whose last token stands here, or 0


def last_tokens(answer_BS: Tensor, count: int) -> Tensor:
    """The numbers of `answer_BS`, 1 to `count`, each only where its answer's last token stands.

    `answer_BS` has an answer's number where the label is one of its tokens, so the last of them
    stands one place after the number's last, in the same document. Neither padding nor an end
    token within the answer is looked at.
    """
    answer, found = answer_BS.reshape(-1), torch.zeros_like(answer_BS)
    last = answer.new_zeros(count + 1)
    last.scatter_reduce_(0, answer, torch.arange(len(answer)), "amax")
    found.view(-1)[last[1:] + 1] = torch.arange(1, count + 1)
    return found


class Scores:
    """Bradley-Terry over the pairs of the global batch.

    Batches have `answer` [B, S], as `PreferenceDataset` makes it, and `margin` [B, S] where the
    data has some. Logs the loss; `score`, the mean of all answers; and of the pairs `accuracy`, the
    share whose chosen answer has the larger score, `margin`, by how much, and both scores.
    """

    figures = ("loss", "score", "accuracy", "margin", "chosen_score", "rejected_score")
    tokens_of = "score"
    has_perplexity = False
    reads = "values"
    carried = ()
    inputs = (LAST, "answers", MARGIN)

    def __init__(self, settings: RewardModelConfig) -> None:
        self._centring = settings.centring

    def weigh(self, batch: Batch) -> float:
        """See Objective: half the number of answers."""
        count = number_answers(batch)
        batch[LAST] = last_tokens(batch["answer"], count)
        batch.setdefault(MARGIN, torch.zeros_like(batch["loss_mask"]))
        return count / 2

    def __call__(self, values: Tensor, batch: Batch, *, cp_group: Any) -> ObjectiveOutput:
        """See Objective; `values` are those of a scalar head, [B, S / CP]."""
        wide = torch.promote_types(values.dtype, torch.float32)
        last, margin = batch[LAST].reshape(-1), batch[MARGIN].reshape(-1).to(wide)
        both = [values.reshape(-1).to(wide), margin]
        sums = sums_of_answers(both, last, batch=batch, cp_group=cp_group)
        sums = sums.view(len(sums) // 2, 2, len(both))  # there may be none
        chosen, rejected, asked = sums[:, 0, 0], sums[:, 1, 0], sums[:, 0, 1]
        loss = bradley_terry(chosen, rejected, margin=asked, centring=self._centring)
        ways = cp_group.size()  # every context rank has all pairs
        pairs = loss.new_tensor(len(loss) / ways)
        of_pairs = {
            "loss": loss,
            "accuracy": (chosen > rejected).to(wide),
            "margin": chosen - rejected,
            "chosen_score": chosen,
            "rejected_score": rejected,
        }
        figures = {name: (v.detach().sum() / ways, pairs) for name, v in of_pairs.items()}
        figures["score"] = ((chosen + rejected).detach().sum() / ways, 2 * pairs)
        return ObjectiveOutput(loss.sum(), figures)

"""The objective of distillation by itself: what counts, and what it is divided by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from equilibrium_mcore.config.objectives import DistillationConfig

B, S, V, PADDED = 2, 8, 11, 16


class Teacher:
    """Given logits, whatever the batch is."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.flatten(0, 1)

    def of(self, batch, rows):
        return lambda tokens: self.logits[tokens, rows.first : rows.first + rows.width]


def outcome(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor):
    """The objective's output and its divisor, on one rank."""
    from equilibrium_mcore.parallel import accelerator

    accelerator.install()
    from equilibrium_mcore.parallel.process_groups import one_rank
    from equilibrium_mcore.training.distillation import TEACHER, Distillation
    from equilibrium_mcore.training.objective import Logits

    settings = DistillationConfig(teacher=Path("t"), temperature=2.0, cross_entropy_weight=0.25)
    objective = Distillation(settings)
    batch = {"labels": labels, "loss_mask": mask, TEACHER: Teacher(teacher)}
    divisor = objective.weigh(batch)
    with one_rank(seed=0) as groups:
        found = objective(Logits(student, V, groups.tp), batch, cp_group=groups.cp)
    return found, divisor


@pytest.mark.parametrize("kind", ["student", "teacher", "labels"])
def test_trap_mean_over_padding(kind):
    """What does not count changes nothing, has no gradient, and is in no divisor."""
    draw = torch.Generator().manual_seed(0)
    values = {
        "student": torch.randn(B, S, PADDED, generator=draw),
        "teacher": torch.randn(B, S, PADDED, generator=draw),
        "labels": torch.randint(V, (B, S), generator=draw),
    }
    mask = torch.tensor([[0.0, 1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
    values["student"].requires_grad_()
    found, divisor = outcome(**values, mask=mask)
    (slope,) = torch.autograd.grad(found.total, values["student"])
    assert divisor == 4 and all(count == 4 for _, count in found.figures.values())
    assert slope[mask == 0].abs().max() == 0 and (slope[mask > 0].norm(dim=-1) > 0).all()
    assert not slope[..., V:].any()
    other = torch.where(
        (mask > 0).view(B, S, *[1] * (values[kind].dim() - 2)), values[kind].detach(), 3
    )
    changed, _ = outcome(**{**values, kind: other}, mask=mask)
    assert changed.total.item() == found.total.item()


def test_a_batch_without_a_teacher_is_refused():
    from equilibrium_mcore.training.distillation import Distillation

    batch = {"labels": torch.zeros(B, S), "loss_mask": torch.ones(B, S)}
    with pytest.raises(ValueError, match="nothing of a teacher"):
        Distillation(DistillationConfig(teacher=Path("t"))).weigh(batch)

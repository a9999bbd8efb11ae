"""A run whose output weights are damaged for one step: what each rank of `rollback.py` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training import step
from equilibrium_mcore.training.all_callbacks import build_callbacks
from equilibrium_mcore.training.anomalies import Anomaly
from equilibrium_mcore.training.loop import Callback, train
from equilibrium_mcore.training.setup import Run, setup, teardown
from equilibrium_mcore.training.step import StepOutcome

FACTOR = 4.0  # of the output weights, during the forward and backward of the step that spikes


class Seen(NamedTuple):
    """What a run went through, with the steps that `metrics.jsonl` drops at a rollback."""

    losses: list[tuple[int, float]]  # (step, loss) as they came
    spikes: list[tuple[int, float]]
    back_to: list[int]


class Keep(Callback):
    """Remembers every step, also those that are trained again."""

    def __init__(self) -> None:
        self.seen = Seen([], [], [])

    def on_step(self, run: Run, outcome: StepOutcome) -> None:
        self.seen.losses.append((run.progress.step, outcome.loss))

    def on_anomaly(self, run: Run, anomaly: Anomaly) -> None:
        self.seen.spikes.append((anomaly.step, anomaly.loss))

    def on_rollback(self, run: Run, anomaly: Anomaly, *, abandoned: list[str]) -> None:
        self.seen.back_to.append(run.progress.step)


def train_rank(rank_info: RankInfo, *, config: RunConfig, bad_position: int | None) -> Seen:
    """Train with the run's own loop; the step that begins at `bad_position` of the data spikes."""
    run, keep = setup(config, rank_info), Keep()
    with damaged_at(bad_position):
        train(run, [*build_callbacks(config), keep])
    teardown(run)
    return keep.seen


@contextmanager
def damaged_at(bad_position: int | None) -> Iterator[None]:
    """Inside, the step that begins at this position of the data has wrong output weights."""
    sound = step.gradients_of

    def gradients_of(run: Run, batches: list) -> list[Tensor]:
        ((first, _),) = run.ranges_of_next_step()
        if first != bad_position:
            return sound(run, batches)
        return _with_damage(run, lambda: sound(run, batches))

    step.gradients_of = gradients_of
    try:
        yield
    finally:
        step.gradients_of = sound


def _with_damage(run: Run, gradients: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The gradients with wrong output weights, which are as before afterwards."""
    named = [pair for chunk in run.chunks for pair in chunk.named_parameters()]
    weights = [weight for name, weight in named if name.endswith("output_layer.weight")]
    saved = [weight.data.clone() for weight in weights]
    for weight in weights:
        weight.data.mul_(FACTOR)
    outputs = gradients()
    for weight, before in zip(weights, saved, strict=True):
        weight.data.copy_(before)
    return outputs

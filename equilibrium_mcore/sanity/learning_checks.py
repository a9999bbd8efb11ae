"""Checks that train a little: memorizing a few lines, bfloat16 beside float32, the schedule."""

from __future__ import annotations

from typing import Any

import torch

from equilibrium_mcore.config.optimizers import OPTIMIZERS, REST, ByOptimizer
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.optim.schedule import learning_rate_factor
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.sanity.verdict import Check, judged
from equilibrium_mcore.sanity.workbench import any_number_of_samples, varied
from equilibrium_mcore.training.setup import Run, run_alone
from equilibrium_mcore.training.step import train_step

OVERFIT_TOKENS = 3072
OVERFIT_LENGTH = 128
OVERFIT_STEPS = 60
OVERFIT_LOSS = 0.2
# High rates, no decay, and updates as large as AdamW's at the same rate.
OVERFIT: ByOptimizer[dict[str, Any]] = {
    "muon": {"learning_rate": 2e-2, "weight_decay": 0.0, "extra_scale": 0.2, "scale": "spectral"},
    "soap": {"learning_rate": 5e-3, "weight_decay": 0.0},
    "cosmos": {"learning_rate": 5e-3, "weight_decay": 0.0},
    "adamw": {"learning_rate": 5e-3, "weight_decay": 0.0, "learning_rates": {}},
}
PRECISION_STEPS = 20
PRECISION_SEQUENCES = 2
# CPUs without bfloat16 units need minutes for the products with a large vocabulary, so there ids
# are taken modulo this.
PRECISION_VOCABULARY = 4096
# Tolerated difference of the two curves, as a share of the float32 loss, from the measurements in
# docs/reference/sanity.md. fp8 has 4 bits fewer than bf16, so it is allowed 16 times as much.
PRECISION_TOLERANCE = {"bf16": 0.002, "fp16": 0.002, "fp8": 0.032}
NOISE_FACTOR = 4


class Repeated(Samples):
    """A few samples over and over, cut to `length` tokens each, ids modulo `vocabulary`."""

    def __init__(
        self, dataset: Samples, *, tokens: int, length: int, total: int, vocabulary: int
    ) -> None:
        self._pieces: list[dict[str, torch.Tensor]] = []
        self._total = total
        number = 0
        while len(self._pieces) * length < tokens:
            sample = dataset[number]
            number += 1
            whole = len(sample["tokens"]) // length * length
            for start in range(0, whole, length):
                self._pieces.append(_cut(sample, start, length, vocabulary))
        del self._pieces[-(-tokens // length) :]

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._pieces[index % len(self._pieces)]

    def text(self, tokenizer: Tokenizer) -> str:
        """All of it, decoded."""
        return "".join(tokenizer.decode(piece["tokens"].tolist()) for piece in self._pieces)


def _cut(
    sample: dict[str, Any], start: int, length: int, vocabulary: int
) -> dict[str, torch.Tensor]:
    tokens, labels, mask = (
        torch.as_tensor(sample[name])[start : start + length]
        for name in ("tokens", "labels", "loss_mask")
    )
    return {
        "tokens": tokens % vocabulary,
        "labels": labels % vocabulary,
        "loss_mask": mask,
        "position_ids": torch.arange(length),
    }


def check_overfit(config: RunConfig, datasets: Datasets, tokenizer: Tokenizer | None) -> Check:
    """The model learns about 3k tokens by heart with its own optimizer at high rates."""
    length = min(OVERFIT_LENGTH, config.training.sequence_length)
    sequences = -(-OVERFIT_TOKENS // length)
    total = OVERFIT_STEPS * sequences
    few = Repeated(
        datasets.train,
        tokens=OVERFIT_TOKENS,
        length=length,
        total=total,
        vocabulary=config.model.vocab_size,
    )
    fast = varied(
        config,
        data=any_number_of_samples(config),
        optimizer={
            "schedule": {"kind": "constant", "warmup_steps": 5, "decay_steps": 0},
            **OVERFIT,
        },
        training={
            "sequence_length": length,
            "micro_batch_size": sequences,
            "global_batch_size": sequences,
            "steps": OVERFIT_STEPS,
            "validation_interval_steps": 0,
        },
    )
    losses: list[float] = []
    with run_alone(fast, datasets=Datasets(few, None, None)) as run:
        while len(losses) < OVERFIT_STEPS and not (losses and losses[-1] < OVERFIT_LOSS):
            losses.append(train_step(run).loss)
    what = f"{sequences * length:,} tokens"
    if tokenizer:
        what += f" ({few.text(tokenizer).count(chr(10))} lines)"
    curve = " ".join(f"{loss:.2f}" for loss in losses[:: max(1, len(losses) // 10)])
    good = f"{what} learned to loss {losses[-1]:.3f} in {len(losses)} steps (below {OVERFIT_LOSS})"
    problems = []
    if not losses[-1] < OVERFIT_LOSS:
        problems.append(
            f"loss {losses[-1]:.3f} after {OVERFIT_STEPS} steps over the same {what}, not below "
            f"{OVERFIT_LOSS}: something keeps it from learning"
        )
    return judged("overfit", problems, good, details=[f"loss {curve}"], figures={"loss": losses})


def check_precision(config: RunConfig, datasets: Datasets, *, asked: str) -> Check:
    """The curve in the run's own precision (bf16 where that is fp32) follows that in fp32.

    Some optimizers amplify any difference, so a third curve shows how far rounding the first
    weights once, in fp32, already leads; NOISE_FACTOR times that is allowed too.
    """
    precision = "bf16"
    if asked != "fp32" and describe_host().has_cuda:
        precision = asked
    length = min(OVERFIT_LENGTH, config.training.sequence_length)
    samples = PRECISION_SEQUENCES * PRECISION_STEPS
    vocabulary = config.model.vocab_size
    if not describe_host().has_cuda:
        vocabulary = min(vocabulary, PRECISION_VOCABULARY)
    short = Repeated(
        datasets.train,
        tokens=samples * length,
        length=length,
        total=samples,
        vocabulary=vocabulary,
    )
    curves: dict[str, list[float]] = {}
    weights: dict[str, torch.Tensor] = {}
    for name in ("unrounded", "fp32", precision):
        changed = varied(
            config,
            model={"vocab_size": vocabulary},
            data=any_number_of_samples(config),
            training={
                "precision": "fp32" if name == "unrounded" else name,
                "sequence_length": length,
                "micro_batch_size": PRECISION_SEQUENCES,
                "global_batch_size": PRECISION_SEQUENCES,
                "steps": PRECISION_STEPS,
                "validation_interval_steps": 0,
            },
            optimizer={"schedule": {"kind": "constant", "decay_steps": 0}},
        )
        with run_alone(changed, datasets=Datasets(short, None, None)) as run:
            _start_from(run, weights)
            curves[name] = [train_step(run).loss for _ in range(PRECISION_STEPS)]
    return _judge_curves(curves, precision)


def _start_from(run: Run, weights: dict[str, torch.Tensor]) -> None:
    """Take `weights`, or fill them, rounded to bfloat16, from the first run."""
    parameters = dict(run.chunks[0].named_parameters())
    if not weights:
        for name, value in parameters.items():
            weights[name] = value.detach().bfloat16().to(value.dtype)
        return
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(weights[name])
    run.optimizer.refresh_main_weights()


def _judge_curves(curves: dict[str, list[float]], precision: str) -> Check:
    reference = curves["fp32"]

    def gaps(name: str) -> list[float]:
        return [abs(b - a) / a for a, b in zip(reference, curves[name], strict=True)]

    noise, seen = max(gaps("unrounded")), gaps(precision)
    allowed = max(PRECISION_TOLERANCE[precision], NOISE_FACTOR * noise)
    step = max(range(len(seen)), key=seen.__getitem__)
    text = (
        f"{precision} is {seen[step]:.2%} from fp32 at most, at step {step} of {len(seen)} "
        f"({curves[precision][step]:.4f}, {reference[step]:.4f}); allowed {allowed:.1%}"
    )
    problems = [] if seen[step] <= allowed else [text]
    if not reference[-1] < reference[0]:
        problems.append(
            f"the loss does not fall in {len(seen)} steps at the run's own rates: "
            f"{reference[0]:.3f} to {reference[-1]:.3f}"
        )
    details = [
        f"{name:<9} " + " ".join(f"{loss:.3f}" for loss in curve[::3])
        for name, curve in curves.items()
    ]
    details.append(f"rounding the first weights alone leads {noise:.2%} away")
    return judged("precision", problems, text, details=details, figures={**curves, "noise": noise})


def show_schedule(config: RunConfig) -> Check:
    """The learning rates at key steps of the run as configured; FAIL if the peak is not reached."""
    schedule, total = config.optimizer.schedule, config.training.steps
    marks = {0, schedule.warmup_steps, total // 4, total // 2, 3 * total // 4, total - 1}
    if schedule.kind == "wsd":
        marks |= {total - schedule.decay_steps, total - schedule.decay_steps // 2}
    steps = sorted(step for step in marks if 0 <= step < total)
    factors = [learning_rate_factor(schedule, step=step, total_steps=total) for step in steps]
    peaks = {
        name: getattr(config.optimizer, name).learning_rate
        for name in OPTIMIZERS
        if name in (REST, config.optimizer.matrices)
    }
    rows = [
        (step, *(f"{peak * factor:.2e}" for peak in peaks.values()))
        for step, factor in zip(steps, factors, strict=True)
    ]
    lines = terminal_table(("step", *peaks), rows, align="r").splitlines()
    problems = []
    if max(factors) < 0.99:
        problems.append(f"the peak rate is never reached: at most {max(factors):.0%} of it")
    name = f"{schedule.kind}, {schedule.warmup_steps} warmup of {total} steps"
    return judged("schedule", problems, name, details=lines)

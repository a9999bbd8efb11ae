"""Learning-rate schedules as a factor on every peak learning rate."""

from __future__ import annotations

import math

from equilibrium_mcore.config.optimizers import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, *, step: int, total_steps: int) -> float:
    """The factor for the update that makes step `step` (0-based) of `total_steps`.

    Warmup rises linearly and reaches 1 at the update after `warmup_steps` of them. cosine falls to
    `minimum_ratio` at the end; wsd stays at 1 until the last `decay_steps` (arXiv 2404.06395).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    floor = schedule.minimum_ratio
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        span = max(1, total_steps - schedule.warmup_steps)
        progress = min(1.0, (step - schedule.warmup_steps) / span)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    start = total_steps - schedule.decay_steps
    if step < start:
        return 1.0
    progress = min(1.0, (step - start + 1) / max(1, schedule.decay_steps))
    shape = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "sqrt": 1 - math.sqrt(progress),
    }[schedule.decay_form]
    return floor + (1 - floor) * shape

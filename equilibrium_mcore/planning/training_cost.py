"""How long and how dear training is: FLOPs by the model, devices and utilisation by the user.

    FLOPs     = tokens * training FLOPs per token            (models/flops.py)
    FLOP/s    = devices * peak FLOP/s of one * utilisation   (MFU, arXiv 2204.02311, appendix B)
    hours     = FLOPs / FLOP/s / 3600
    cost      = hours * devices * price of a device's hour

Nothing but training itself is in it: no validation, checkpoints, restarts or idle nodes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.models.flops import training_flops_per_token


@dataclass(frozen=True)
class Cluster:
    """The devices. `utilization` is an assumption; docs/reference/performance.md has measurements.

    peak_tflops: dense peak of one device in TFLOP/s, for the number format of the training.
    price_per_hour: of one device, in any currency; None when it is not asked for.
    """

    devices: int
    peak_tflops: float
    utilization: float
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.devices < 1 or self.peak_tflops <= 0 or not 0 < self.utilization <= 1:
            raise ValueError(
                f"--gpus {self.devices}, --peak-tflops {self.peak_tflops:g}, --mfu "
                f"{self.utilization:g}: needed are at least 1 device, a peak above 0, and a "
                f"utilisation above 0 and at most 1"
            )
        if self.price_per_hour is not None and self.price_per_hour < 0:
            raise ValueError(f"--price {self.price_per_hour:g}: must not be negative")


@dataclass(frozen=True)
class TrainingCost:
    """The estimate, and all that it was made of."""

    model: str
    tokens: int
    sequence_length: int
    flops_per_token: int
    flops: float
    devices: int
    peak_tflops: float
    utilization: float
    tokens_per_second: float
    hours: float
    days: float
    device_hours: float
    price_per_hour: float | None
    cost: float | None

    def lines(self) -> list[str]:
        """The arithmetic, a step a line."""
        rate = self.devices * self.peak_tflops * self.utilization
        lines = [
            f"{self.tokens:,} tokens * {self.flops_per_token:,} FLOPs per token ({self.model}, "
            f"sequences of {self.sequence_length:,}, forward and backward) = {self.flops:.4g} "
            f"FLOPs",
            f"{self.devices:,} GPUs * {self.peak_tflops:g} TFLOP/s * {self.utilization:g} "
            f"utilisation = {rate:,.1f} TFLOP/s, {self.tokens_per_second:,.0f} tokens/s",
            f"{self.flops:.4g} / {rate * 1e12:.4g} / 3600 = {self.hours:,.1f} hours = "
            f"{self.days:,.2f} days, {self.device_hours:,.0f} GPU hours",
        ]
        if self.cost is not None:
            lines.append(
                f"{self.device_hours:,.0f} GPU hours * {self.price_per_hour:g} = {self.cost:,.0f}"
            )
        return lines

    def values(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


def training_cost(
    model: ModelConfig, *, tokens: int, sequence_length: int, cluster: Cluster
) -> TrainingCost:
    """The estimate for training `model` once on `tokens` tokens."""
    per_token = training_flops_per_token(model, sequence_length)
    flops = float(tokens) * per_token
    rate = cluster.devices * cluster.peak_tflops * 1e12 * cluster.utilization
    hours = flops / rate / 3600
    device_hours = hours * cluster.devices
    price = cluster.price_per_hour
    return TrainingCost(
        model=model.name,
        tokens=tokens,
        sequence_length=sequence_length,
        flops_per_token=per_token,
        flops=flops,
        devices=cluster.devices,
        peak_tflops=cluster.peak_tflops,
        utilization=cluster.utilization,
        tokens_per_second=rate / per_token,
        hours=hours,
        days=hours / 24,
        device_hours=device_hours,
        price_per_hour=price,
        cost=None if price is None else device_hours * price,
    )

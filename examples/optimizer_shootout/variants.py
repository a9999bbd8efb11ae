"""The optimizers that are compared: the overrides of the run file that choose each of them."""

from __future__ import annotations

from collections.abc import Callable

# All keep an update about as large as AdamW's at the same rate, so one grid serves all. Embeddings,
# norms and the like have the same rate as the matrices, with every optimizer.
GRID = (2e-3, 4e-3, 8e-3, 1.6e-2)
MORE_RATES = 2  # each twice the one before, where the highest is best
CONSTANT = ["optimizer.schedule.kind=constant", "optimizer.schedule_free={}"]


def _matrices(name: str, *more: str) -> Callable[[float], list[str]]:
    def overrides(rate: float) -> list[str]:
        return [
            f"optimizer.matrices={name}",
            f"optimizer.{name}.learning_rate={rate:g}",
            f"optimizer.{name}.weight_decay=0.01",
            f"optimizer.adamw.learning_rate={rate:g}",
            *more,
        ]

    return overrides


def _adamw(*more: str) -> Callable[[float], list[str]]:
    def overrides(rate: float) -> list[str]:
        return ["optimizer.matrices=adamw", f"optimizer.adamw.learning_rate={rate:g}", *more]

    return overrides


VARIANTS: dict[str, Callable[[float], list[str]]] = {
    "adamw": _adamw("optimizer.adamw.weight_decay=0.01"),
    "muon": _matrices("muon", "optimizer.muon.extra_scale=0.2"),
    "soap": _matrices("soap"),
    "cosmos": _matrices("cosmos", "optimizer.cosmos.rank=16"),
    "schedule_free_adamw": _adamw("optimizer.adamw.weight_decay=0.01", *CONSTANT),
    "schedule_free_muon": _matrices("muon", "optimizer.muon.extra_scale=0.2", *CONSTANT),
}

"""Verdicts: a layout's trace against the reference's, quantity by quantity.

Tolerances come from what re-ordering float32 sums does (docs/certificate.md tells how they were
measured): they are not to be widened to make a layout pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from equilibrium_mcore.certify.trace import Trace
from equilibrium_mcore.certify.whole import Whole
from equilibrium_mcore.config.schema import OptimizerConfig

LOSS = 1e-5
GRADIENT = 5e-5
# Of a step's float32 change of weights, by what made it. SOAP gives every direction of its
# eigenbasis an update of full size, also where a gradient is hardly more than rounding.
UPDATE = {"adamw": 2e-3, "muon": 2e-3, "cosmos": 2e-3, "soap": 1e-1}
# The same in float64, from the same gradients. SOAP's eigenvectors of close eigenvalues turn by
# rounding over their distance; a fault turns them by far more.
GIVEN_UPDATE = {"adamw": 1e-9, "muon": 1e-9, "cosmos": 1e-9, "soap": 1e-7}
STATE = 0.0
CHOICES = 2e-3


@dataclass(frozen=True)
class Verdict:
    """One line of a certificate."""

    what: str
    difference: float  # worst relative difference
    tolerance: float
    where: str  # the first parameter, layer or step beyond tolerance; else the worst one

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for nan


def compare(layout: Trace, reference: Trace, *, optimizer: OptimizerConfig) -> list[Verdict]:
    """Losses, gradients, weights and routing of a layout's training against the reference's."""
    verdicts = [
        _curve("loss of every step", layout.loss, reference.loss, LOSS),
        _curve(
            "gradient norm of every step", layout.gradient_norm, reference.gradient_norm, LOSS * 10
        ),
    ]
    if reference.aux_loss[0] is not None:
        verdicts.append(_curve("auxiliary loss", layout.aux_loss, reference.aux_loss, LOSS))
    if reference.choices:
        verdicts.append(_choices(layout, reference))
    start = reference.weights[0]
    verdicts.append(_tensors("weights loaded", layout.weights[0], start, STATE))
    verdicts.append(_tensors("gradients", layout.gradients, reference.gradients, GRADIENT))
    for step in sorted(reference.weights):
        if step:
            verdicts.append(
                _tensors(
                    f"weights after {step} step{'s' if step > 1 else ''}, relative to the update",
                    layout.weights[step],
                    reference.weights[step],
                    max(UPDATE[name] for name in optimizer.used),
                    since=start,
                )
            )
    verdicts.append(_replicas(layout))
    return verdicts


def compare_updates(layout: Trace, reference: Trace, *, optimizer: OptimizerConfig) -> Verdict:
    """What the optimizer makes of the same gradients, in float64."""
    tolerance = max(GIVEN_UPDATE[name] for name in optimizer.used)
    return _tensors(
        "update from given gradients, float64", layout.update, reference.update, tolerance
    )


def main_weights(found: Trace) -> Verdict:
    """bf16: after weights alone were loaded, the optimizer's main weights are those weights."""
    return _tensors(
        "bf16: main weights after loading weights alone",
        found.state.get("main", {}),
        {name: whole for name, whole in found.weights[0].items() if name in found.state["main"]},
        STATE,
    )


def compare_states(what: str, found: Trace, expected: Trace) -> list[Verdict]:
    """Weights and optimizer state after a load against those before the save: equal to the bit."""
    last = max(expected.weights)
    verdicts = [_tensors(f"{what}: weights", found.weights[0], expected.weights[last], STATE)]
    for key, tensors in expected.state.items():
        verdicts.append(
            _tensors(f"{what}: optimizer {key}", found.state.get(key, {}), tensors, STATE)
        )
    return verdicts


def _curve(what: str, found: list[float], expected: list[float], tolerance: float) -> Verdict:
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return worst_verdict(what, {f"step {i + 1}": d for i, d in enumerate(differences)}, tolerance)


def _tensors(
    what: str,
    found: dict[str, Whole],
    expected: dict[str, Whole],
    tolerance: float,
    *,
    since: dict[str, Whole] | None = None,
) -> Verdict:
    """Worst norm(found - expected) / norm(expected - since) over tensors, in model order."""
    differences = {}
    for name in sorted(expected, key=_model_order):
        whole = expected[name].data.double()
        if name not in found:
            differences[name] = math.inf
            continue
        apart = (found[name].data.double() - whole).norm().item()
        base = whole - since[name].data.double() if since else whole
        scale = base.norm().item()
        differences[name] = apart / scale if scale else (0.0 if apart == 0 else math.inf)
    for name in found.keys() - expected.keys():
        differences[name] = math.inf
    return worst_verdict(what, differences, tolerance)


def _choices(layout: Trace, reference: Trace) -> Verdict:
    by_layer: dict[int, list[int]] = {}
    for place, experts in reference.choices.items():
        counts = by_layer.setdefault(place[0], [0, 0])
        counts[0] += layout.choices.get(place) != experts
        counts[1] += 1
    shares = {f"layer {layer}": wrong / of for layer, (wrong, of) in sorted(by_layer.items())}
    return worst_verdict("share of tokens routed elsewhere", shares, CHOICES)


def _replicas(layout: Trace) -> Verdict:
    last = layout.weights[max(layout.weights)]
    apart = {name: last[name].disagreement for name in sorted(last, key=_model_order)}
    return worst_verdict("weights differ between replicas", apart, STATE)


def worst_verdict(what: str, differences: dict[str, float], tolerance: float) -> Verdict:
    """The first place beyond tolerance, with the worst difference of all."""
    worst = max(differences, key=lambda name: _size(differences[name]))
    beyond = [name for name, value in differences.items() if not value <= tolerance]
    return Verdict(what, differences[worst], tolerance, beyond[0] if beyond else worst)


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _model_order(name: str) -> tuple:
    """Embedding first, then layers by number, then what follows them."""
    parts = name.split(".")
    if "layers" in parts:
        return 1, int(parts[parts.index("layers") + 1]), name
    return (0 if name.startswith("embedding") else 2), 0, name

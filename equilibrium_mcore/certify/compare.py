"""Verdicts: a layout's trace against the reference's, quantity by quantity.

Both train in float64, so what re-ordering sums does is far below what a fault does (figures:
docs/design/certificate.md). Tolerances are not to be widened to make a layout pass.
"""

from __future__ import annotations

import math

from equilibrium_mcore.certify.generated import compare_generated
from equilibrium_mcore.certify.ties import Tie, compare_choices
from equilibrium_mcore.certify.trace import Trace
from equilibrium_mcore.certify.verdict import Verdict, worst_verdict
from equilibrium_mcore.checkpoint.pieces import FullTensor
from equilibrium_mcore.config.optimizers import ByOptimizer, OptimizerConfig

EXACT = 1e-9
# Of a step's change of weights, by what made it. SOAP gives every direction of its eigenbasis an
# update of full size, also where a gradient is hardly more than rounding, and its eigenvectors of
# close eigenvalues turn by rounding over their distance; a fault turns them by far more.
UPDATE: ByOptimizer[float] = {"adamw": EXACT, "muon": EXACT, "cosmos": EXACT, "soap": 1e-7}
STATE = 0.0
# The second look, in float32: what re-ordering its sums does, with room to spare. It only warns.
FLOAT32_LOSS = 1e-5
FLOAT32_GRADIENT = 5e-5


def compare(
    layout: Trace, reference: Trace, *, optimizer: OptimizerConfig, tie: Tie | None = None
) -> list[Verdict]:
    """Losses, gradients, weights and routing of a layout's training against the reference's.

    With a `tie`, numbers of its step and of later ones are left out, since two right ones differ.
    """
    steps = len(reference.loss) if tie is None else tie.step - 1
    tolerance = update_tolerance(optimizer)
    verdicts = [_narrow(layout, reference)]
    for what, found, expected in (
        ("loss of every step", layout.loss, reference.loss),
        ("gradient norm of every step", layout.gradient_norm, reference.gradient_norm),
        ("auxiliary loss of every step", layout.aux_loss, reference.aux_loss),
    ):
        if steps and expected[0] is not None:
            verdicts.append(_curve(what, found[:steps], expected[:steps], EXACT))
    if reference.choices:
        verdicts.append(compare_choices(layout.choices, reference.choices, tie=tie))
    start = reference.weights[0]
    verdicts.append(_tensors("weights loaded", layout.weights[0], start, STATE))
    if reference.generated:
        verdicts += compare_generated(layout.generated, reference.generated)
    if steps:
        verdicts.append(_tensors("gradients", layout.gradients, reference.gradients, EXACT))
    for step in sorted(reference.weights):
        if 0 < step <= steps:
            verdicts.append(
                _tensors(
                    f"weights after {step} step{'s' if step > 1 else ''}, relative to the update",
                    layout.weights[step],
                    reference.weights[step],
                    tolerance,
                    since=start,
                )
            )
    if layout.balancing:
        found, plain = layout.balancing["own"], layout.balancing["next_token"]
        verdicts.append(_tensors("balancing losses against next_token's", found, plain, EXACT))
    verdicts.append(_replicas(layout))
    return verdicts


def compare_float32(layout: Trace, reference: Trace) -> list[Verdict]:
    """The first step once more, in float32, where users train: verdicts that only warn."""
    return [
        _curve("float32: loss", layout.loss, reference.loss, FLOAT32_LOSS, warns=True),
        _tensors(
            "float32: gradients",
            layout.gradients,
            reference.gradients,
            FLOAT32_GRADIENT,
            warns=True,
        ),
    ]


def update_tolerance(optimizer: OptimizerConfig) -> float:
    """How far updates may differ, relative to themselves: what the run's optimizers need."""
    return max(UPDATE[name] for name in optimizer.used)


def compare_updates(layout: Trace, reference: Trace, *, optimizer: OptimizerConfig) -> Verdict:
    """What the optimizer makes of the same gradients."""
    return _tensors(
        "update from given gradients",
        layout.update,
        reference.update,
        update_tolerance(optimizer),
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


def _narrow(layout: Trace, reference: Trace) -> Verdict:
    """A cast to float32 would hide whatever is smaller than its rounding."""
    places = {"nothing": 0} | reference.narrow | layout.narrow
    return worst_verdict("operations and tensors that were not float64", places, 0.0)


def _curve(
    what: str, found: list[float], expected: list[float], tolerance: float, *, warns: bool = False
) -> Verdict:
    differences = {
        f"step {step}": relative(abs(a - b), abs(b))
        for step, (a, b) in enumerate(zip(found, expected, strict=True), start=1)
    }
    return worst_verdict(what, differences, tolerance, warns=warns)


def relative(apart: float, scale: float) -> float:
    """apart / scale, NaN where either is; of nothing, only nothing is 0 apart."""
    if scale:
        return apart / scale
    return apart * math.inf if apart else 0.0


def _tensors(
    what: str,
    found: dict[str, FullTensor],
    expected: dict[str, FullTensor],
    tolerance: float,
    *,
    since: dict[str, FullTensor] | None = None,
    warns: bool = False,
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
        differences[name] = relative(apart, base.norm().item())
    for name in found.keys() - expected.keys():
        differences[name] = math.inf
    return worst_verdict(what, differences, tolerance, warns=warns)


def _replicas(layout: Trace) -> Verdict:
    last = layout.weights[max(layout.weights)]
    apart = {name: last[name].disagreement for name in sorted(last, key=_model_order)}
    return worst_verdict("weights differ between replicas", apart, STATE)


def _model_order(name: str) -> tuple:
    """Embedding first, then layers by number, then what follows them."""
    parts = name.split(".")
    if "layers" in parts:
        return 1, int(parts[parts.index("layers") + 1]), name
    return (0 if name.startswith("embedding") else 2), 0, name

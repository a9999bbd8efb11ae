"""A random run with one layout, from nothing but a seed and a number."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from equilibrium_mcore.certify.twin import Layout, in_layout, make_twin, parse_layout
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run, run_from_mapping
from equilibrium_mcore.config.pattern import CUT, LAYER_KINDS, ByKind, count_kinds
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.training_rules import KIND_RECOMPUTING
from tools.bench.random_runs.layouts import own_layout, random_layout
from tools.bench.random_runs.settings import DRAWN, SPECIAL

REPOSITORY = Path(__file__).resolve().parents[3]
BASE = REPOSITORY / "configs" / "runs" / "quickstart.yaml"
THREADS = (1, 2, 4)
# How often a rule that ties settings together is kept on purpose; else chance decides, so that the
# rules are asked too.
HEED = 0.92
OVERRIDES = (
    {"pattern": "*.linear_fc2.weight", "optimizer": "adamw"},
    {"pattern": "*.out_proj.weight", "optimizer": "soap", "learning_rate": 1e-3},
    {"pattern": "*norm.weight", "weight_decay": 0.1},
    {"pattern": "*.in_proj.weight", "split": False},
    {"pattern": "*.linear_fc1.weight", "optimizer": "muon", "split": False},
    {"pattern": "*.linear_proj.weight", "optimizer": "cosmos", "weight_decay": 0.05},
)

OVERRIDDEN: ByKind[tuple[str, ...]] = {
    "mamba": (".out_proj.", ".in_proj.", "norm."),
    "mla": (".linear_proj.", "norm."),
    "attention": (".linear_proj.", "norm."),
    "mlp": (".linear_fc1.", ".linear_fc2.", "norm."),
    "moe": (".linear_fc1.", ".linear_fc2.", "norm."),
}
"""Of the names in OVERRIDES those that a kind's parameters have."""

COPIES: ByKind[int] = {"mamba": 1, "mla": 1, "attention": 1, "mlp": 1, "moe": 2}
"""How often a kind stands among the letters that a pattern is drawn from."""


@dataclass(frozen=True)
class Drawn:
    """A case of the campaign."""

    number: int
    config: RunConfig
    layout: Layout
    threads: int  # of every rank
    refused: tuple[str, ...]  # what the rules said to the proposals before this one


def draw(seed: int, number: int) -> Drawn:
    """Case `number` of the campaign `seed`: the first proposal that every rule allows."""
    refused: list[str] = []
    while True:
        rng = random.Random(f"{seed}/{number}/{len(refused)}")
        values, layout = propose(rng)
        try:
            config, certified = _allowed(values, layout)
        except ConfigError as error:
            refused.append(error.problems[0])
        else:
            return Drawn(number, config, certified, rng.choice(THREADS), tuple(refused))


@cache
def _base() -> RunConfig:
    return load_run(BASE)


def propose(rng: random.Random) -> tuple[dict[str, Any], str]:
    """Values of a run, allowed or not, and its layout by name."""
    values = _base().model_dump(mode="json")
    values["optimizer"]["schedule_free"] = {}
    for section in LAYER_KINDS.values():
        values["model"][section] = values["model"][section] or {}
    for key, choices in DRAWN.items():
        *path, last = key.split(".")
        place = values
        for name in path:
            place = place[name]
        place[last] = rng.choice(choices)
    layout = random_layout(rng)
    values["model"]["layer_pattern"] = _pattern(rng, layout)
    if "E" not in values["model"]["layer_pattern"] and _heeds(rng):
        layout = {name: size for name, size in layout.items() if name not in ("ep", "etp")}
    _tie_together(values, rng, layout)
    values["optimizer"]["overrides"] = _overrides(rng, values)
    _faster(values, rng)
    text = ",".join(f"{name}={size}" for name, size in layout.items()) or "dp=2"
    values["parallelism"].update(own_layout(text, values["parallelism"]))
    return values, text


def _allowed(values: dict[str, Any], text: str) -> tuple[RunConfig, Layout]:
    """The run and its layout; ConfigError where the run, its twin, or the twin's layout breaks a
    rule. No rank is started."""
    config = run_from_mapping(values)
    layout = parse_layout(text, base=config.parallelism)
    with tempfile.TemporaryDirectory() as folder:
        in_layout(make_twin(config, [layout], folder=Path(folder)), layout)
    return config, layout


def drawn_settings(drawn: Drawn) -> dict[str, Any]:
    """The value of every drawn setting that the run has, by key."""
    values = drawn.config.model_dump(mode="json")
    found = {"threads of a rank": drawn.threads}
    for key in (*SPECIAL, *DRAWN):
        *path, last = key.split(".")
        place: Any = values
        for part in path:
            place = place[part] if isinstance(place, dict) else None
            if isinstance(place, list):  # overrides: one at most
                place = place[0] if place else None
        if place is not None:
            found[key] = place[last]
    return found


def _heeds(rng: random.Random) -> bool:
    return rng.random() < HEED


def _pattern(rng: random.Random, layout: dict[str, int]) -> str:
    """1 to 3 layers a stage of every kind, with a cut at every stage's end."""
    left_out = rng.choice("*+")  # the two do not mix
    letters = "".join(LAYER_KINDS)
    if _heeds(rng):
        fitting = ((letter, kind) for letter, kind in LAYER_KINDS.items() if letter != left_out)
        letters = "".join(letter * COPIES[kind] for letter, kind in fitting)
    stages = layout.get("pp", 1) * layout.get("vpp", 1)
    segments = ["".join(rng.choices(letters, k=rng.randint(1, 3))) for _ in range(stages)]
    return (CUT if _heeds(rng) else "").join(segments)


def _tie_together(values: dict[str, Any], rng: random.Random, layout: dict[str, int]) -> None:
    """Keep what rules tie together, mostly. Some of it is drawn again, the rest follows."""
    model, moe = values["model"], values["model"]["moe"]
    fixes: dict[str, Callable[[], Any]] = {
        "one activation": lambda: model["mlp"].update(activation=moe["activation"]),
        "bias of sigmoids": lambda: moe.update(
            expert_bias=moe["expert_bias"] and moe["score_function"] == "sigmoid"
        ),
        "one chosen of softmax": lambda: moe.update(normalize_top_k=_normalizes(moe)),
        "experts on their ranks": lambda: (
            layout.get("tp", 1) > 1 and "E" in model["layer_pattern"] and layout.pop("sp", None)
        ),
        "groups over ranks": lambda: model["mamba"].update(
            num_groups=max(model["mamba"]["num_groups"], layout.get("tp", 1))
        ),
        "a sequence's loss": lambda: (
            values["data"]["packing"] == "documents"
            and moe["load_balancing"] == "seq_aux_loss"
            and values["training"].update(micro_batch_size=1)
        ),
        "modules of layers": lambda: _recomputed(values),
    }
    for fix in fixes.values():
        if _heeds(rng):
            fix()
    if rng.random() < 0.75:
        values["optimizer"]["schedule_free"] = None
    elif _heeds(rng):
        values["optimizer"]["schedule"]["kind"] = "constant"
    for letter, section in LAYER_KINDS.items():
        # A section without a layer, now and then: it must change nothing.
        if letter not in model["layer_pattern"] and rng.random() < 0.9:
            model[section] = None


def _normalizes(moe: dict[str, Any]) -> bool:
    if moe["score_function"] == "softmax":
        return moe["normalize_top_k"] and moe["top_k"] > 1
    return moe["normalize_top_k"] or moe["top_k"] > 1


def _recomputed(values: dict[str, Any]) -> None:
    """Of the modules to recompute those that the pattern has."""
    kinds = count_kinds(values["model"]["layer_pattern"])
    training = values["training"]
    wanted = training["recompute_modules"]
    fits = [m for m in wanted if KIND_RECOMPUTING.get(m) in (None, *kinds)]
    training["recompute_modules"] = fits or ["core_attn"]


def _faster(values: dict[str, Any], rng: random.Random) -> None:
    """Fused SwiGLU and what overlaps, each in half of the runs, mostly where the model has it."""
    model, parallelism = values["model"], values["parallelism"]
    kinds = count_kinds(model["layer_pattern"])
    mixers = {model[kind]["activation"] for kind in ("mlp", "moe") if kind in kinds}
    shared = "moe" in kinds and model["moe"]["shared_ffn_hidden_size"] > 0
    can_overlap = shared and parallelism["moe_dispatcher"] == "alltoall"
    fused, overlapped, reduced = (rng.choice((False, True)) for _ in range(3))
    values["training"]["fused"]["activation"] = fused and (mixers == {"swiglu"} or not _heeds(rng))
    parallelism["overlap_shared_experts"] = overlapped and (can_overlap or not _heeds(rng))
    parallelism["overlap_grad_reduce"] = reduced


def _overrides(rng: random.Random, values: dict[str, Any]) -> list[dict[str, Any]]:
    """None mostly; else one that the pattern's layers have, or now and then any."""
    if rng.random() < 0.7:
        return []
    kinds = count_kinds(values["model"]["layer_pattern"])
    there = {name for kind in kinds for name in OVERRIDDEN[kind]}
    fitting = [o for o in OVERRIDES if any(name in o["pattern"] for name in there)]
    return [dict(rng.choice(fitting if _heeds(rng) else OVERRIDES))]

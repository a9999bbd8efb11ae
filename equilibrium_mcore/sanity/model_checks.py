"""Checks of the model at its start: loss, causality, gradients, router, optimizer, determinism."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equilibrium_mcore.config.pattern import LAYER_KINDS, MIXES_POSITIONS, layers_of
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.sanity.verdict import Check, judged, skipped
from equilibrium_mcore.sanity.workbench import Observed, grouped_by_layer, to_device
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.step import validation_loss

INITIAL_LOSS_TOLERANCE = 0.3  # nats
MOST_LOGIT_COST = 1.0  # nats that the spread of the first logits may cost
LEAK_TOLERANCE = 1e-3  # of what the layer adds; rounding is below 1e-5, a leak is about 1
LEAST_BALANCE = 0.7  # entropy of the load over that of an even one
FEWEST_TOKENS_PER_EXPERT = 50  # on average, to expect every expert to be used


def check_initial_loss(run: Run, seen: Observed, full_model: ModelConfig) -> Check:
    """The first loss is that of logits which know nothing: ln(vocabulary), and their spread.

    Logits of a normed state through weights of deviation s have variance s^2 * hidden_size, which
    costs half of it in nats. A tied output layer also sees the input's own row, by
    s * hidden_size at most.
    """
    model, loss = run.config.model, seen.losses[0]
    uniform = math.log(model.padded_vocab_size)
    spread = model.init_std**2 * model.hidden_size / 2
    expected = uniform + spread
    upper = expected
    if model.tie_embeddings:
        upper = float(
            torch.logaddexp(
                torch.tensor(expected), torch.tensor(model.init_std * model.hidden_size)
            )
        )
    problems = []
    if not uniform - INITIAL_LOSS_TOLERANCE <= loss <= upper + INITIAL_LOSS_TOLERANCE:
        side = (
            "below it something tells the answer (labels not shifted, a look ahead, a repeated "
            "batch)"
            if loss < uniform
            else "above it weights start too large"
        )
        problems.append(
            f"loss {loss:.3f} at step 0, expected {expected:.3f} = ln({model.padded_vocab_size:,}) "
            f"+ {spread:.3f} within {INITIAL_LOSS_TOLERANCE}: {side}"
        )
    cost = full_model.init_std**2 * full_model.hidden_size / 2
    if cost > MOST_LOGIT_COST:
        problems.append(
            f"model.init_std={full_model.init_std} at hidden_size={full_model.hidden_size} makes "
            f"first logits whose spread alone costs {cost:.2f} nats (limit {MOST_LOGIT_COST}): use "
            f"{math.sqrt(1 / (2.5 * full_model.hidden_size)):.3g} = sqrt(2 / (5 hidden_size))"
        )
    return judged(
        "initial_loss",
        problems,
        f"loss {loss:.3f}, expected {expected:.3f} = ln({model.padded_vocab_size:,}) + "
        f"{spread:.3f}, within {INITIAL_LOSS_TOLERANCE}",
        figures={"loss": loss, "ln_vocabulary": uniform, "expected": expected},
    )


@torch.no_grad()
def check_loss_alignment(run: Run, seen: Observed) -> Check:
    """The model's loss at i is the cross-entropy of its logits at i against labels[i]."""
    chunk = run.chunks[0].eval()
    given = {name: to_device(value) for name, value in seen.inputs[0].items()}
    losses = chunk(attention_mask=None, **given)
    logits = chunk(attention_mask=None, **{k: v for k, v in given.items() if k != "labels"})
    labels = given["labels"]

    def difference(targets: Tensor, first: int, last: int) -> float:
        """Of the model's losses at [first, last) from those of `targets` there."""
        length = labels.shape[1]
        there = slice(first, length + last)
        mine = F.cross_entropy(
            logits[:, there].float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        return float((losses[:, there].flatten().float() - mine).abs().max())

    here = difference(labels, 0, 0)
    problems = []
    if here > 1e-3:
        again = difference(labels[:, 1:], 0, -1)
        why = "; it uses labels[i+1]: shifted again inside the model" if again < 1e-3 else ""
        problems.append(
            f"the model's loss per token differs by up to {here:.3g} nats from the cross-entropy "
            f"of its own logits against the labels{why}"
        )
    return judged(
        "loss_alignment",
        problems,
        f"the loss at i is that of logits at i against labels[i], to {here:.1e} nats",
        figures={"largest_difference": here},
    )


# ---------------------------------------------------------------------------------- causality


@torch.no_grad()
def check_causality(run: Run, seen: Observed) -> Check:
    """Each layer by itself: what comes from position p on changes nothing before p.

    A mixer must show the past to the future, and a channel mixer must not mix positions at all.
    Last, whole logits are compared, with tokens changed from p on.
    """
    chunk = run.chunks[0].eval()
    base = {name: to_device(seen.inputs[0][name][:1]) for name in ("input_ids", "position_ids")}
    length = base["input_ids"].shape[1]
    places = sorted({1, length // 4, length // 2 - 1, length // 2, length - 1} - {0})
    recorded = _record_layers(chunk, base, rows=len(places) + 1)
    problems, worst = [], {}
    letters = layers_of(run.config.model.layer_pattern)
    for index, (layer, arguments) in enumerate(recorded):
        kind = LAYER_KINDS[letters[index]]
        leak, forward = _layer_leak(layer, arguments, places)
        worst[kind] = max(worst.get(kind, 0.0), leak)
        where = f"layer {index} ({kind})"
        if leak > LEAK_TOLERANCE:
            problems.append(f"{where} sees the future: {leak:.2g} of what it adds comes from there")
        mixes = MIXES_POSITIONS[kind]
        if forward < 0:
            problems.append(f"{where} sees nothing: it adds zero whatever comes in")
            continue
        if mixes and forward < LEAK_TOLERANCE:
            problems.append(f"{where} does not see the past: it mixes no positions")
        if not mixes and forward > LEAK_TOLERANCE:
            problems.append(f"{where} mixes positions, which a channel mixer must not")
    whole = _logit_leak(chunk, base, places)
    if whole > LEAK_TOLERANCE and not problems:
        problems.append(f"logits change by {whole:.2g} of their spread when later tokens change")
    kinds = ", ".join(f"{kind} {leak:.0e}" for kind, leak in worst.items())
    return judged(
        "causality",
        problems,
        f"positions {places} of {length}: largest share from the future {kinds}; logits "
        f"{whole:.0e} (limit {LEAK_TOLERANCE:.0e})",
        figures={"leak_by_kind": worst, "logits": whole},
    )


def _record_layers(chunk: torch.nn.Module, base: dict[str, Tensor], *, rows: int) -> list:
    """(layer, its keyword arguments), with the first row of the batch repeated `rows` times."""
    recorded = []

    def before(layer, args, kwargs) -> None:
        recorded.append((layer, kwargs))

    layers = next(m.layers for m in chunk.modules() if hasattr(m, "layer_type_list"))
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    chunk(attention_mask=None, **{name: t.expand(rows, -1) for name, t in base.items()})
    for hook in hooks:
        hook.remove()
    return recorded


def _layer_leak(layer: torch.nn.Module, arguments: dict, places: list[int]) -> tuple[float, float]:
    """How much comes from the future, and how much goes from position p to those after it.

    Row 0 stays, row k + 1 is another from places[k] on (first figure) or at places[k] alone
    (second). Both as a share of what the layer adds to its input; (0, -1) where it adds nothing.
    """
    hidden = arguments["hidden_states"].clone()  # (sequence, batch, hidden)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden) * hidden.std()
    later, only = hidden.clone(), hidden.clone()
    for row, place in enumerate(places, start=1):
        later[place:, row] = noise[place:, row]
        only[place, row] = noise[place, row]

    def added(states: Tensor) -> Tensor:
        output = layer(**{**arguments, "hidden_states": states})
        return (output[0] if isinstance(output, tuple) else output) - states

    plain, with_later, with_only = added(hidden), added(later), added(only)
    scale = plain.std().item()
    if scale == 0:
        return 0.0, -1.0
    leak = forward = 0.0
    for row, place in enumerate(places, start=1):
        leak = max(leak, _largest(with_later[:place, row] - plain[:place, 0]))
        forward = max(forward, _largest(with_only[place + 1 :, row] - plain[place + 1 :, 0]))
    return leak / scale, forward / scale


def _logit_leak(chunk: torch.nn.Module, base: dict[str, Tensor], places: list[int]) -> float:
    rows = len(places) + 1
    tokens = base["input_ids"].repeat(rows, 1)
    for row, place in enumerate(places, start=1):
        tokens[row, place:] = (tokens[row, place:] + 1) % tokens.max()
    positions = base["position_ids"].expand(rows, -1)
    logits = chunk(input_ids=tokens, position_ids=positions, attention_mask=None)
    leaks = [_largest(logits[row, :p] - logits[0, :p]) for row, p in enumerate(places, start=1)]
    return max(leaks) / logits.std().item()


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


# ---------------------------------------------------------------- gradients, router, optimizer


def check_gradients(seen: Observed) -> Check:
    """Every parameter, and every row of it, gets a finite gradient that is not zero."""
    problems = [f"{name}: gradient is not finite" for name in sorted(seen.non_finite)]
    problems += _by_kind(seen.frozen, "frozen (requires_grad is False)")
    silent, rows = [], []
    for name, sums in seen.gradient_sums.items():
        tokens = seen.expert_tokens(name)
        if tokens == 0:
            continue  # check_router names it
        if not sums.any():
            silent.append(name)
        elif not name.endswith("word_embeddings.weight") and (tokens or 1000) > 100:
            dead = (sums == 0).nonzero().flatten()
            if len(dead):
                rows.append(f"{name}: rows {dead[0]} to {dead[-1]} ({len(dead)} of {len(sums)})")
    problems += _by_kind(silent, "no gradient")
    problems += [f"{row} get no gradient" for row in rows]
    smallest = min(seen.gradient_sums, key=lambda n: float(seen.gradient_sums[n].mean()) or 1e9)
    return judged(
        "gradients",
        problems,
        f"all {len(seen.gradient_sums)} parameters get one in every row, over "
        f"{len(seen.losses)} steps; smallest in {smallest}",
    )


def _by_kind(names: list[str], what: str) -> list[str]:
    return [
        f"{members[0]}: {what}" + (f" (and {len(members) - 1} like it)" if members[1:] else "")
        for members in grouped_by_layer(names).values()
    ]


def check_router(run: Run, seen: Observed) -> Check:
    """Every expert of every MoE layer is used, and none carries far too much."""
    moe = run.config.model.moe
    if moe is None or not seen.tokens_of_experts:
        return skipped("router", "the model has no routed experts")
    problems, details, figures = [], [], {}
    per_expert = sum(next(iter(seen.tokens_of_experts.values())).tolist()) / moe.num_experts
    for layer, load in sorted(seen.tokens_of_experts.items()):
        share = load.double() / load.sum()
        balance = float(-(share * share.clamp_min(1e-30).log()).sum() / math.log(moe.num_experts))
        ratio = float(share.max() * moe.num_experts)
        unused = (load == 0).nonzero().flatten().tolist()
        details.append(
            f"layer {layer:>3} {_bars(share)} balance {balance:.2f}, max/mean {ratio:.1f}"
        )
        figures[str(layer)] = {"load": load.tolist(), "balance": balance, "max_over_mean": ratio}
        if unused and per_expert >= FEWEST_TOKENS_PER_EXPERT:
            problems.append(
                f"layer {layer}: {len(unused)} of {moe.num_experts} experts got no token, e.g. "
                f"{unused[:8]}"
            )
        elif balance < LEAST_BALANCE:
            problems.append(
                f"layer {layer}: balance {balance:.2f} (entropy over that of an even load; at "
                f"least {LEAST_BALANCE}), busiest expert {int(share.argmax())} has {ratio:.1f} "
                "times its share"
            )
    worst = min(entry["balance"] for entry in figures.values())
    return judged(
        "router",
        problems,
        f"all {moe.num_experts} experts used in {len(figures)} layers, {per_expert:,.0f} tokens "
        f"each on average; least balance {worst:.2f} (at least {LEAST_BALANCE})",
        details=details,
        figures=figures,
    )


def _bars(share: Tensor) -> str:
    """The load of each expert as a bar, the mean half high."""
    heights = (share * len(share) * 4).round().clamp(0, 8).int().tolist()
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)


def check_optimizer_groups(seen: Observed) -> Check:
    """Every parameter is in exactly one optimizer group, and its update reaches the model."""
    missing = [name for name, count in seen.memberships.items() if count == 0]
    twice = [name for name, count in seen.memberships.items() if count > 1]
    strange = [name for name in seen.memberships if name.startswith("unknown ")]
    problems = _by_kind([n for n in missing if n not in seen.frozen], "in no optimizer group")
    problems += _by_kind(twice, "in two optimizer groups")
    problems += [f"an optimizer updates a tensor of no parameter: {name}" for name in strange]
    still = [name for name in seen.unmoved if name not in missing]
    problems += _by_kind(still, "has a gradient, but steps leave it as it was")
    return judged(
        "optimizer_groups",
        problems,
        f"each of {len(seen.memberships)} parameters is in one group and moved",
    )


@torch.no_grad()
def check_determinism(run: Run, seen: Observed) -> Check:
    """The same batch twice, in another place of the batch, and in training mode: the same loss."""
    chunk = run.chunks[0]
    given = {name: to_device(value) for name, value in seen.inputs[0].items()}

    def losses(*, train: bool = False, **changed: Tensor) -> Tensor:
        chunk.train(train)
        return chunk(attention_mask=None, **{**given, **changed}).float()

    tolerance = 1e-4 if accelerator.has_cuda() else 1e-5
    plain = losses()
    differences = {
        "a second evaluation": _largest(losses() - plain),
        "training mode (no dropout is set)": _largest(losses(train=True) - plain),
        "the batch turned upside down": _largest(
            losses(**{k: v.flip(0) for k, v in given.items()}).flip(0) - plain
        ),
    }
    if run.datasets.validation is not None:
        differences["a second validation"] = abs(validation_loss(run) - validation_loss(run))
    problems = [
        f"{what} changes losses by {difference:.2g} nats (limit {tolerance:.0e})"
        for what, difference in differences.items()
        if not difference <= tolerance
    ]
    return judged(
        "determinism",
        problems,
        f"the same losses to {max(differences.values()):.0e} nats in {', '.join(differences)}",
        figures=differences,
    )

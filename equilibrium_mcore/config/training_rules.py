"""Rules of the schedule, the optimizer, the data, and of precision against the host."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from equilibrium_mcore.config.layer_splits import FP8_WIDTHS
from equilibrium_mcore.config.model_rules import uses
from equilibrium_mcore.config.optimizers import OPTIMIZERS
from equilibrium_mcore.config.pattern import ByKind
from equilibrium_mcore.config.rule_kit import RuleTable, Subject

TRAINING_RULES = RuleTable()
rule = TRAINING_RULES.rule

FP8_MULTIPLE = 16  # Transformer Engine: inner widths of FP8 products are multiples of 16
RECOMPUTED: ByKind[tuple[str, ...]] = {
    "mamba": (),
    "mla": ("mla_up_proj",),
    "attention": (),
    "mlp": ("mlp",),
    "moe": ("moe", "moe_act"),
}
"""Names in `training.recompute_modules` that only this kind has; every mixer has `core_attn`."""

KIND_RECOMPUTING = {module: kind for kind, modules in RECOMPUTED.items() for module in modules}
FP8_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


@rule("training")
def steps_or_epochs(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    if training.steps is not None and training.epochs is not None:
        yield (
            f"training.steps={training.steps} and training.epochs={training.epochs:g}: a run has "
            "one length; leave one of them out (null)"
        )
    if training.steps is None and training.epochs is None:
        yield (
            "training.steps: missing (optimizer steps of the whole run); give it, or "
            "training.epochs, from which steps are computed"
        )


@rule("optimizer", "training")
def schedule_fits_steps(subject: Subject) -> Iterator[str]:
    schedule, steps = subject.config.optimizer.schedule, subject.config.training.steps
    if steps is None:  # known when the data has been read: `training/run_data.py`
        return
    decay = schedule.decay_steps if schedule.kind == "wsd" else 0
    if schedule.kind == "wsd" and not decay:
        yield (
            "optimizer.schedule.decay_steps=0 with kind='wsd': the fall at the end needs steps; "
            f"set it to 1 to {max(steps - schedule.warmup_steps, 1)}, or use kind: constant"
        )
    if schedule.warmup_steps + decay > steps:
        parts = f"optimizer.schedule.warmup_steps={schedule.warmup_steps}"
        parts += f" + decay_steps={decay}" if decay else ""
        yield (
            f"{parts} is more than training.steps={steps}: shorten the schedule to at most "
            f"{steps} steps, or train at least {schedule.warmup_steps + decay}"
        )


@rule("optimizer")
def moments_forget(subject: Subject) -> Iterator[str]:
    optimizer = subject.config.optimizer
    decays = {
        f"optimizer.{name}.{key}": getattr(getattr(optimizer, name), key)
        for name, row in OPTIMIZERS.items()
        for key in row.decays
    }
    if optimizer.schedule_free is not None:
        decays["optimizer.schedule_free.beta"] = optimizer.schedule_free.beta
        decays["optimizer.schedule_free.matrix_momentum"] = optimizer.schedule_free.matrix_momentum
    for key, value in decays.items():
        if value == 1:
            yield f"{key}=1: the average would never take up a gradient; use less than 1, e.g. 0.95"


@rule("optimizer")
def schedule_free_has_no_decay(subject: Subject) -> Iterator[str]:
    optimizer = subject.config.optimizer
    if optimizer.schedule_free is not None and optimizer.schedule.kind != "constant":
        yield (
            f"optimizer.schedule.kind={optimizer.schedule.kind!r} with optimizer.schedule_free: "
            "the average of the weights takes the place of a falling rate; set "
            "optimizer.schedule.kind: constant (a warmup may stay), or schedule_free: null"
        )


@rule("optimizer")
def overrides_change_something(subject: Subject) -> Iterator[str]:
    """Whether a pattern matches a parameter is seen when the model is built."""
    for index, override in enumerate(subject.config.optimizer.overrides):
        values = override.model_dump(exclude={"pattern"})
        if all(value is None for value in values.values()):
            yield (
                f"optimizer.overrides.{index}: pattern {override.pattern!r} changes nothing; give "
                f"it one of {', '.join(values)}"
            )


@rule("training")
def stop_is_within_the_run(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    stop = training.stop_after_steps
    if None not in (stop, training.steps) and stop > training.steps:
        yield (
            f"training.stop_after_steps={stop} is after the end, training.steps={training.steps}: "
            f"use 1 to {training.steps}, or null"
        )


@rule("checkpoint")
def a_named_step_is_resumed(subject: Subject) -> Iterator[str]:
    checkpoint = subject.config.checkpoint
    if checkpoint.resume_step is not None and checkpoint.resume != "must":
        yield (
            f"checkpoint.resume_step={checkpoint.resume_step} with checkpoint.resume="
            f"{checkpoint.resume!r}: a step that is named must be there; set checkpoint.resume: "
            "must, or resume_step: null"
        )


@rule("data", "training")
def data_lasts_the_run(subject: Subject) -> Iterator[str]:
    """The order of the data has to be made for at least as many sequences as the run takes."""
    training, data = subject.config.training, subject.config.data
    samples = getattr(data, "train_samples", None)
    if samples is None or training.steps is None or data.order != "megatron":
        return
    needed = training.steps * training.global_batch_size
    if samples < needed:
        yield (
            f"data.train_samples={samples} is less than training.steps={training.steps} * "
            f"training.global_batch_size={training.global_batch_size} = {needed}: use {needed} or "
            "more, or null"
        )


@rule("data", "training")
def samples_can_be_left_out(subject: Subject) -> Iterator[str]:
    data, training = subject.config.data, subject.config.training
    if data.type != "indexed" or data.order == "ledger":
        return
    asked = []
    if training.left_out:
        asked.append(f"training.left_out={[list(pair) for pair in training.left_out]}")
    if training.anomalies is not None and training.anomalies.policy == "rollback":
        asked.append("training.anomalies.policy=rollback")
    for setting in asked:
        yield (
            f"{setting} with data.order={data.order!r}: that order is made for a fixed number of "
            "samples, and none can take the place of one that is left out; set data.order: ledger"
        )


@rule("data")
def ledger_settings_have_a_ledger(subject: Subject) -> Iterator[str]:
    data = subject.config.data
    if data.type != "indexed" or data.order == "ledger":
        return
    asked = [f"data.packing={data.packing!r}"] if data.packing != "stream" else []
    asked += [
        f"data.sources.{index}.max_epochs={source.max_epochs}"
        for index, source in enumerate(data.sources)
        if source.max_epochs is not None
    ]
    for setting in asked:
        yield (
            f"{setting} with data.order={data.order!r}: megatron-core's order does not know where "
            "a source stands; set data.order: ledger, or leave it out"
        )


@rule("model", "training")
def recompute_has_its_layers(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    if training.recompute != "selective":
        return
    if not training.recompute_modules:
        yield (
            "training.recompute_modules=[] with recompute='selective' recomputes nothing: name "
            "at least one, e.g. [core_attn], or set recompute: none"
        )
    for module in training.recompute_modules:
        kind = KIND_RECOMPUTING.get(module)
        if kind and not uses(subject, kind):
            yield (
                f"training.recompute_modules has {module!r}, but model.layer_pattern="
                f"{subject.config.model.layer_pattern!r} has no {kind} layer: take it out"
            )
    if training.backend == "torch" and "moe_act" in training.recompute_modules:
        yield (
            "training.recompute_modules has 'moe_act' with training.backend='torch': only "
            "Transformer Engine's grouped experts recompute their activation; set backend: auto on "
            "a host with a GPU, or take it out (moe recomputes the whole layer)"
        )
    delayed_fp8 = training.precision == "fp8" and training.fp8_recipe == "delayed"
    if delayed_fp8 and "moe_act" in training.recompute_modules:
        yield (
            "training.recompute_modules has 'moe_act' with fp8_recipe='delayed', which "
            "megatron-core refuses: use another recipe, e.g. tensorwise, or take it out"
        )


@rule("data")
def sources_are_told_apart(subject: Subject) -> Iterator[str]:
    data = subject.config.data
    for name, count in Counter(source.name for source in data.sources).items():
        if count > 1:
            yield (
                f"data.sources: {count} sources have the name {name!r}; logs tell sources apart "
                "by name: give each its own"
            )
    for index, source in enumerate(data.sources if data.type == "indexed" else ()):
        if source.prefix.suffix in (".bin", ".idx"):
            yield (
                f"data.sources.{index}.prefix='{source.prefix}' has an ending, but it names the "
                f"pair of .bin and .idx: use '{source.prefix.with_suffix('')}'"
            )


def split_shares(split: str) -> list[float] | None:
    """Shares of train, validation and test, not yet scaled; None when `split` is not such text."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    if len(shares) > 3 or not all(math.isfinite(share) and share >= 0 for share in shares):
        return None
    return shares + [0.0] * (3 - len(shares))


@rule("data")
def split_is_good(subject: Subject) -> Iterator[str]:
    if subject.config.data.type != "indexed":
        return
    split = subject.config.data.split
    shares = split_shares(split)
    if shares is None:
        yield (
            f"data.split={split!r}: must be up to three numbers of at least 0, for train, "
            "validation and test, e.g. 98,1,1"
        )
    elif shares[0] <= 0:
        yield f"data.split={split!r} leaves nothing to train on: make the first share positive"


@rule("data", "training")
def validation_has_documents(subject: Subject) -> Iterator[str]:
    data, interval = subject.config.data, subject.config.training.validation_interval_steps
    if not interval:
        return
    if data.type != "indexed":
        if not any(source.validation for source in data.sources):
            yield (
                f"training.validation_interval_steps={interval}, but no source of {data.name!r} "
                "has files to validate on: name them in data.sources.0.validation, or set the "
                "interval to 0"
            )
        return
    shares = split_shares(data.split)
    if shares is not None and shares[1] <= 0:
        yield (
            f"training.validation_interval_steps={interval}, but data.split={data.split!r} gives "
            "no documents to validation: make the second share positive, e.g. 98,1,1, or set the "
            "interval to 0"
        )


@rule("data")
def tokenizer_matches_its_file(subject: Subject) -> Iterator[str]:
    tokenizer = subject.config.data.tokenizer
    other = {
        ("SentencePieceTokenizer", ".json"): "HuggingFaceTokenizer",
        ("HuggingFaceTokenizer", ".model"): "SentencePieceTokenizer",
    }.get((tokenizer.type, tokenizer.model.suffix))
    if other:
        yield (
            f"data.tokenizer.type={tokenizer.type!r} does not read "
            f"data.tokenizer.model='{tokenizer.model}': use type: {other}, or another file"
        )


def fp8_widths(subject: Subject) -> dict[str, int]:
    """Widths of the weight matrices that one rank multiplies in FP8, by key."""
    model, p = subject.config.model, subject.config.parallelism
    widths = {"model.hidden_size": model.hidden_size}
    for kind, of_kind in FP8_WIDTHS.items():
        if uses(subject, kind):
            widths |= of_kind(model, p)
    return widths


@rule("model", "parallelism", "training")
def fp8_widths_are_multiples(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    if training.precision != "fp8":
        return
    for key, width in fp8_widths(subject).items():
        if width % FP8_MULTIPLE:
            below = width // FP8_MULTIPLE * FP8_MULTIPLE
            fit = f"{below} or {below + FP8_MULTIPLE}" if below else str(FP8_MULTIPLE)
            yield (
                f"training.precision='fp8': {key} = {width} is not a multiple of {FP8_MULTIPLE} "
                f"(FP8 products need it on every rank): make it {fit}, split less, or use bf16"
            )


@rule("training")
def fp8_needs_transformer_engine(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    if training.precision == "fp8" and training.backend == "torch":
        yield (
            "training.backend='torch' with training.precision='fp8': FP8 products are Transformer "
            "Engine's; set backend: auto or transformer_engine, or precision: bf16"
        )


@rule("training", "checkpoint")
def delayed_scaling_is_not_resumed(subject: Subject) -> Iterator[str]:
    """Transformer Engine keeps the history of the scales as a pickle, which it refuses to load."""
    training, checkpoint = subject.config.training, subject.config.checkpoint
    if training.precision != "fp8" or training.fp8_recipe != "delayed":
        return
    asked = [f"checkpoint.resume={checkpoint.resume!r}"] if checkpoint.resume != "never" else []
    if training.anomalies is not None and training.anomalies.policy == "rollback":
        asked.append("training.anomalies.policy='rollback'")
    for setting in asked:
        yield (
            f"training.fp8_recipe='delayed' with {setting}: its scales depend on the steps before, "
            "and Transformer Engine does not load that history from a checkpoint; use fp8_recipe: "
            "tensorwise or blockwise, which keep none, or run without going back to a checkpoint "
            "(checkpoint.resume: never, and no rollback)"
        )


@rule("training")
def host_can_do_it(subject: Subject) -> Iterator[str]:
    training, host = subject.config.training, subject.host
    if host is None:
        return
    allowed = "fp32 or bf16" if not host.has_cuda else "fp32, bf16 or fp16"
    if training.precision in ("fp16", "fp8") and not host.has_cuda:
        yield (
            f"training.precision={training.precision!r} needs a CUDA GPU, and this host "
            f"({host.device_name}) has none: use {allowed}"
        )
    elif training.precision == "fp8" and not host.has_transformer_engine:
        yield (
            "training.precision='fp8' needs Transformer Engine, which is not installed: install "
            f"the extra `cuda`, or use {allowed}"
        )
    elif training.precision == "fp8" and host.compute_capability is not None:
        need = FP8_CAPABILITY[training.fp8_recipe]
        if host.compute_capability < need:
            able = [r for r, c in FP8_CAPABILITY.items() if c <= host.compute_capability]
            fit = f"use fp8_recipe {' or '.join(able)}" if able else f"use precision {allowed}"
            yield (
                f"training.fp8_recipe={training.fp8_recipe!r} needs compute capability "
                f"{need[0]}.{need[1]}, and {host.device_name} has "
                f"{host.compute_capability[0]}.{host.compute_capability[1]}: {fit}"
            )
    selected = training.recompute_modules if training.recompute == "selective" else ()
    if "moe_act" in selected and not (host.has_cuda and host.has_transformer_engine):
        missing = "a CUDA GPU" if not host.has_cuda else "Transformer Engine"
        yield (
            f"training.recompute_modules has 'moe_act', which needs {missing}: only Transformer "
            f"Engine's grouped experts recompute their activation, and this host "
            f"({host.device_name}) lacks it; take it out (moe recomputes the whole layer)"
        )
    if training.backend == "transformer_engine":
        missing = "a CUDA GPU" if not host.has_cuda else "Transformer Engine"
        if not (host.has_cuda and host.has_transformer_engine):
            yield (
                f"training.backend='transformer_engine' needs {missing}, which this host "
                f"({host.device_name}) lacks: set backend: torch or auto"
            )

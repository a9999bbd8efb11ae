"""What adapters need of the other settings."""

from __future__ import annotations

from collections.abc import Iterator

from equilibrium_mcore.config.pattern import count_kinds
from equilibrium_mcore.config.rule_kit import RuleTable, Subject

ADAPTER_RULES = RuleTable()
rule = ADAPTER_RULES.rule


@rule("adapters", "training")
def adapters_freeze_the_rest(subject: Subject) -> Iterator[str]:
    config = subject.config
    if config.adapters is not None and config.training.frozen:
        yield (
            f"training.frozen={config.training.frozen} with adapters: everything but the adapters "
            "is frozen then; leave it empty, and choose layers by adapters.targets"
        )


@rule("adapters", "model", "parallelism")
def adapters_of_experts_are_whole(subject: Subject) -> Iterator[str]:
    config = subject.config
    if config.adapters is None or not config.adapters.experts:
        return
    if "moe" not in count_kinds(config.model.layer_pattern):
        yield "adapters.experts=True, but no layer of model.layer_pattern is a mixture of experts"
    if config.parallelism.expert_tensor > 1:
        yield (
            f"adapters.experts=True with parallelism.expert_tensor="
            f"{config.parallelism.expert_tensor}: an expert's adapter is not cut; set "
            "expert_tensor to 1, or leave the experts without adapters"
        )


@rule("adapters", "parallelism")
def adapters_of_shared_experts_do_not_overlap(subject: Subject) -> Iterator[str]:
    config = subject.config
    if config.adapters is not None and config.parallelism.overlap_shared_experts:
        yield (
            "parallelism.overlap_shared_experts=True with adapters: overlapped, a shared expert's "
            "linear layers leave their sums to others, which adapters do not know of; set it to "
            "false"
        )

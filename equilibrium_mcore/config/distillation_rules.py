"""Rules of distillation: what a run learns from, and that it learns from it."""

from __future__ import annotations

from collections.abc import Iterator

from equilibrium_mcore.config.objectives import DistillationConfig
from equilibrium_mcore.config.rule_kit import RuleTable, Subject
from equilibrium_mcore.files.paths import real_path

DISTILLATION_RULES = RuleTable()
rule = DISTILLATION_RULES.rule


@rule("stage", "objective")
def distillation_is_a_stage(subject: Subject) -> Iterator[str]:
    config = subject.config
    if (config.stage == "distill") != isinstance(config.objective, DistillationConfig):
        yield (
            f"objective.type={config.objective.type!r} with stage={config.stage!r}: stage distill "
            "loads the teacher of objective distillation; set both, or neither"
        )


@rule("objective", "output_directory")
def there_is_a_teacher(subject: Subject) -> Iterator[str]:
    objective, output = subject.config.objective, subject.config.output_directory
    if not isinstance(objective, DistillationConfig):
        return
    if objective.teacher is None and objective.targets is None:
        yield (
            "objective.teacher: missing (the model to learn from): name a run's output directory "
            "or one of its checkpoints, or objective.targets, which tools/store_targets.py makes"
        )
    for key in ("teacher", "targets"):
        path = getattr(objective, key)
        if path is not None and real_path(path).is_relative_to(real_path(output)):
            yield (
                f"objective.{key}={str(path)!r} lies in output_directory={str(output)!r}: a run "
                "does not learn from itself; name another folder"
            )


@rule("objective", "model")
def the_teacher_counts(subject: Subject) -> Iterator[str]:
    objective, model = subject.config.objective, subject.config.model
    if not isinstance(objective, DistillationConfig):
        return
    if objective.cross_entropy_weight == 1:
        yield (
            "objective.cross_entropy_weight=1: nothing is left for the teacher; use less, or "
            "another stage (pretrain, sft), which loads none"
        )
    if objective.targets is not None and objective.top_k >= model.vocab_size:
        yield (
            f"objective.top_k={objective.top_k} with model.vocab_size={model.vocab_size}: the rest "
            f"would be empty; use at most {model.vocab_size - 1}, or leave objective.targets out "
            "and name the teacher, whose whole distribution counts then"
        )

"""The settings of every optimizer, and what a config must know of each: one row per optimizer.

How an optimizer is built is a row of `optim/build.py`. Tables annotated `ByOptimizer` have a row
for each; `tests/test_rows.py` finds them and asks that none is forgotten.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from equilibrium_mcore.config.section import (
    Epsilon,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    setting,
)

Iterations = Annotated[int, Field(gt=0, le=100)]
OptimizerName = Literal["muon", "soap", "cosmos", "adamw"]
"""An optimizer: the name of its section, and of its rows."""

REST = "adamw"  # updates what is no matrix, whatever updates the matrices

type ByOptimizer[T] = dict[str, T]
"""A table with a row for every optimizer, and no other."""


class MuonConfig(Section):
    """Muon for matrices: K. Jordan 2024, arXiv 2502.16982."""

    learning_rate: PositiveFloat = setting(0.02, "peak learning rate")
    momentum: Fraction = setting(0.95, "decay of the momentum")
    nesterov: bool = setting(True, "look ahead along the momentum")
    newton_schulz_steps: Iterations = setting(5, "iterations of the orthogonalisation")
    coefficients: Literal["simple", "quintic", "polar_express", "cans", "aol"] = setting(
        "quintic", "coefficients of the iteration, by emerging-optimizers' names"
    )
    scale: Literal["spectral", "unit_rms_norm", "shape_scaling"] = setting(
        "spectral", "how the update is scaled by the matrix's shape"
    )
    extra_scale: PositiveFloat = setting(1.0, "factor on the update")
    matmul_precision: Literal["highest", "high", "medium"] = setting(
        "highest", "precision of float32 products in the iteration; medium may use bfloat16"
    )
    weight_decay: NonNegativeFloat = setting(0.1, "decoupled weight decay")


class SoapConfig(Section):
    """SOAP for matrices: Adam in the eigenbasis of Shampoo's preconditioner, arXiv 2409.11321."""

    learning_rate: PositiveFloat = setting(3e-3, "peak learning rate")
    beta1: Fraction = setting(0.95, "decay of the momentum")
    beta2: Fraction = setting(0.95, "decay of the second moment in the eigenbasis")
    preconditioner_beta: Fraction = setting(0.95, "decay of the preconditioners L and R")
    epsilon: Epsilon = setting(1e-8, "added to the root of the second moment")
    basis_interval_steps: PositiveInt = setting(
        10, "steps between two refreshes of the eigenbases (one power iteration and a QR)"
    )
    max_dimension: PositiveInt = setting(
        8192, "a side with more rows or columns than this keeps its own basis"
    )
    weight_decay: NonNegativeFloat = setting(0.1, "decoupled weight decay")


class CosmosConfig(Section):
    """COSMOS for matrices: SOAP on the leading eigen-subspace, Muon beside it, arXiv 2502.17410."""

    learning_rate: PositiveFloat = setting(3e-3, "peak learning rate")
    rank: PositiveInt = setting(
        64, "dimensions of the leading subspace; at most half of a matrix's smaller side"
    )
    beta1: Fraction = setting(0.9, "decay of the momentum")
    beta2: Fraction = setting(0.96, "decay of the subspace and of the second moment in it")
    epsilon: Epsilon = setting(1e-8, "added to the root of the second moment")
    muon_weight: NonNegativeFloat = setting(
        0.2, "root mean square of Muon's share beside SOAP's (the paper's gamma)"
    )
    update_rms: PositiveFloat = setting(
        0.2, "root mean square of an update at learning rate 1; 0.2 is AdamW's usual size"
    )
    newton_schulz_steps: Iterations = setting(5, "iterations of the orthogonalisation")
    coefficients: Literal["simple", "quintic", "polar_express", "cans", "aol"] = setting(
        "simple", "coefficients of the iteration, by emerging-optimizers' names"
    )
    matmul_precision: Literal["highest", "high", "medium"] = setting(
        "highest", "precision of float32 products in the iteration; medium may use bfloat16"
    )
    weight_decay: NonNegativeFloat = setting(0.1, "decoupled weight decay")


class AdamWConfig(Section):
    """AdamW for everything that is not a matrix between two features."""

    learning_rate: PositiveFloat = setting(3e-4, "peak learning rate")
    learning_rates: dict[
        Literal[
            "embedding",
            "output",
            "head",
            "norm",
            "bias",
            "conv",
            "router",
            "ssm",
            "matrix",
            "adapter",
        ],
        PositiveFloat,
    ] = setting({}, "peak learning rate of one kind of parameter, instead of learning_rate")
    beta1: Fraction = setting(0.9, "decay of the first moment")
    beta2: Fraction = setting(0.95, "decay of the second moment")
    epsilon: Epsilon = setting(1e-8, "added to the root of the second moment")
    weight_decay: NonNegativeFloat = setting(
        0.0, "decoupled weight decay, on embedding, output and router only"
    )


class ScheduleConfig(Section):
    """Learning-rate schedule, as a factor on every peak learning rate."""

    kind: Literal["cosine", "wsd", "constant"] = setting("cosine", "form after the warmup")
    warmup_steps: NonNegativeInt = setting(0, "linear rise from 0")
    decay_steps: NonNegativeInt = setting(0, "wsd: the last steps, in which it falls")
    decay_form: Literal["linear", "cosine", "sqrt"] = setting(
        "linear", "wsd: form of the fall; sqrt is 1 - sqrt(x)"
    )
    minimum_ratio: Fraction = setting(0.1, "factor at the end")


class ScheduleFreeConfig(Section):
    """Schedule-free training: averaged weights instead of a decaying rate, arXiv 2405.15682."""

    beta: Fraction = setting(
        0.9, "gradients are taken at beta * average + (1 - beta) * fast weights"
    )
    matrix_momentum: Fraction = setting(
        0.0,
        "momentum inside the matrix optimizer, instead of its own; 0: averaging is the only one",
    )


class OverrideConfig(Section):
    """Parameters that are treated otherwise than the table says; what is null stays."""

    pattern: str = setting(
        doc="parameter names, with * for any text, e.g. *.linear_kv_down_proj.weight; "
        "tools/show_param_groups.py prints them"
    )
    optimizer: OptimizerName | None = setting(None, "what updates it")
    learning_rate: PositiveFloat | None = setting(None, "peak learning rate")
    weight_decay: NonNegativeFloat | None = setting(None, "decoupled weight decay")
    split: bool | None = setting(None, "false: a matrix of several maps is treated as one")


class OptimizerConfig(Section):
    """What updates which parameters."""

    matrices: OptimizerName = setting("muon", "optimizer of the weight matrices")
    muon: MuonConfig = MuonConfig()
    soap: SoapConfig = SoapConfig()
    cosmos: CosmosConfig = CosmosConfig()
    adamw: AdamWConfig = AdamWConfig()
    overrides: list[OverrideConfig] = setting(
        [], "parameters that are treated otherwise; the first pattern that matches decides"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    schedule_free: ScheduleFreeConfig | None = setting(
        None, "average the weights instead of lowering the rate; {} for its defaults, null for not"
    )
    clip_gradient_norm: NonNegativeFloat = setting(1.0, "clip to this global norm; 0 for never")

    @property
    def used(self) -> set[str]:
        """Names of the optimizers that update something, as far as the settings say."""
        overrides = {o.optimizer for o in self.overrides if o.optimizer is not None}
        return {REST, self.matrices} | overrides


class OptimizerRow(NamedTuple):
    """What settings and rules must know of an optimizer.

    Attributes:
        label: its name in prose.
        section: its settings.
        takes_matrices: it updates whole matrices and nothing else; others take any shape.
        decays: settings that are the decay of an average, and must be below 1.
        state_settings: settings that decide the shape of its state, so that a resumed run keeps
            them.
    """

    label: str
    section: type[Section]
    takes_matrices: bool
    decays: tuple[str, ...]
    state_settings: tuple[str, ...] = ()


OPTIMIZERS: ByOptimizer[OptimizerRow] = {
    "muon": OptimizerRow("Muon", MuonConfig, True, decays=("momentum",)),
    "soap": OptimizerRow(
        "SOAP",
        SoapConfig,
        True,
        decays=("beta1", "beta2", "preconditioner_beta"),
        state_settings=("max_dimension",),
    ),
    "cosmos": OptimizerRow(
        "COSMOS", CosmosConfig, True, decays=("beta1", "beta2"), state_settings=("rank",)
    ),
    "adamw": OptimizerRow("AdamW", AdamWConfig, False, decays=("beta1", "beta2")),
}

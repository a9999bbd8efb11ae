"""Small trainable matrices beside frozen ones."""

from __future__ import annotations

from equilibrium_mcore.config.section import PositiveFloat, PositiveInt, Section, setting


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): W + alpha / rank * B A, of which B and A train and nothing else."""

    rank: PositiveInt = setting(16, "columns of B and rows of A")
    alpha: PositiveFloat = setting(32.0, "the product is scaled by alpha / rank")
    targets: list[str] = setting(
        ["*"],
        "linear layers that get an adapter, by name or pattern, e.g. *.in_proj; * is every one but "
        "those of routed experts",
    )
    experts: bool = setting(False, "whether the targets may be in routed experts too")

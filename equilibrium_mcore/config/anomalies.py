"""Settings of what a run does about a step that cannot be right."""

from __future__ import annotations

from typing import Literal

from equilibrium_mcore.config.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    setting,
)


class AnomaliesConfig(Section):
    """Loss and gradient norm of every step, judged before anything is updated."""

    policy: Literal["stop", "skip", "rollback"] = setting(
        "stop",
        "stop: end the run, with nothing updated; skip: go on without this update; rollback: "
        "return to the last good checkpoint, and leave out the samples of this step",
    )
    window_steps: NonNegativeInt = setting(
        128,
        "a spike is judged by the median of so many steps before; 0: only values that are not "
        "finite are anomalies",
    )
    threshold: PositiveFloat = setting(
        10.0, "a spike is further above the median than so many robust standard deviations"
    )
    margin_steps: NonNegativeInt = setting(
        0,
        "rollback: so many steps before the anomaly are suspected too: their samples are left "
        "out, and checkpoints after them are not used",
    )
    most: PositiveInt = setting(3, "the run stops at the next anomaly after so many")

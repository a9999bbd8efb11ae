"""What a group of settings is, and the ranges that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from equilibrium_mcore.files.paths import expand_path

MOST = 10**15  # more than any run counts; sizes that nothing could hold are told by rules
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's; numpy is given the lower half
Minutes = Annotated[int, Field(gt=0, le=43_200)]  # a month
SmallInt = Annotated[int, Field(gt=0, le=65_536)]
Processes = Annotated[int, Field(ge=0, le=256)]
MOST_FLOAT = 1e30  # kept as float32, much larger ones would be infinite
PositiveFloat = Annotated[float, Field(gt=0, le=MOST_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST_FLOAT)]
Epsilon = Annotated[float, Field(ge=1e-30, le=MOST_FLOAT)]  # much smaller ones would be 0
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
# Every setting that is a path: `~` and `$VARS` are replaced when it is read.
UserPath = Annotated[Path, AfterValidator(expand_path)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def setting(default=..., doc: str = "", **limits):
    """A field with its meaning, which `--help` and the docs print."""
    return Field(default, description=doc, **limits)

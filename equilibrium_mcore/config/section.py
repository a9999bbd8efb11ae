"""What a group of settings is, and the ranges that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from equilibrium_mcore.files.paths import expand_path

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Every setting that is a path: `~` and `$VARS` are replaced when it is read.
UserPath = Annotated[Path, AfterValidator(expand_path)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def setting(default=..., doc: str = "", **limits):
    """A field with its meaning, which `--help` and the docs print."""
    return Field(default, description=doc, **limits)

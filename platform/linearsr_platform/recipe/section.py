"""What every part of the recipe is made of: the strict base class and the kinds of numbers and names. Imports no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="letters, digits, - and _, not starting with - or _")]
Experts = Annotated[int, Field(ge=1, le=6)]
SecretName = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$", description="the name of an environment variable, in capitals")]
SecretReference = Annotated[str, Field(pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)$", description="env:NAME or file:/PATH")]


class Section(BaseModel):
    """Base of every recipe section: unknown keys are errors and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

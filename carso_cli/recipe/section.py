"""What all sections of a recipe are made of: the base model, and the kinds of number and text."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from carso_cli.recipe.number import Number

Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
Positive = Annotated[Number, Field(gt=0.0)]
NonNegative = Annotated[Number, Field(ge=0.0)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]


def no_truth(value: object) -> object:
    """Refuse true and false where a number is meant."""
    # `true` equals 1 in Python, so a Literal of numbers would take it.
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


class Section(BaseModel):
    """Base of every section: immutable, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

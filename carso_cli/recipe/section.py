"""What the sections of a recipe are made of: the base model, and the kinds of number and text.

YAML 1.1 reads `1e-3` and `8/255` as text, hence `parse_number`: both, `0.1` and `3` all mean a float.
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# No `inf`, `nan` or `1_000`, which `float` would take.
_PLAIN = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(rf"\s*({_PLAIN})\s*(?:/\s*({_PLAIN})\s*)?")


def parse_number(value: object) -> float:
    """Read a number or a fraction of two numbers; nothing is evaluated.

    Args:
        value: An int, a float, or text such as `"8/255"` or `"1e-3"`.

    Raises:
        ValueError: If it is not a finite number or a fraction with a non-zero denominator.
    """
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise ValueError("not a number or a fraction")
        denominator = float(match[2]) if match[2] else 1.0
        if denominator == 0:
            raise ValueError("the denominator is zero")
        value = float(match[1]) / denominator
    # In Python true and false are integers.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number or a fraction")
    try:
        number = float(value)
    # A whole number of more than 308 digits.
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("the number is not finite")
    return number


def too_large(eps: float, norm: str) -> str:
    """Return what is wrong with a radius above the whole range of pixels, such as 8 for 8/255.

    Args:
        eps: Radius of a perturbation in pixel units, of images in [0, 1].
        norm: `linf` or `l2`; only a largest change of a pixel is bounded by 1.

    Returns:
        A sentence if the radius is above 1 under linf, otherwise nothing.
    """
    if norm != "linf" or eps <= 1.0:
        return ""
    meant = f"; did you mean {eps:g}/255?" if eps <= 255 else ""
    return f"eps {eps:g} is more than the whole range of pixels, [0, 1]{meant}"


def no_truth(value: object) -> object:
    """Refuse true and false where a number is meant."""
    # `true` equals 1 in Python, so a Literal of numbers would take it.
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


# After the bounds, so that pydantic writes these into the JSON schema, from which messages are made.
Parsed = BeforeValidator(parse_number)
Fraction = Annotated[float, Field(ge=0.0, le=1.0), Parsed]
Positive = Annotated[float, Field(gt=0.0), Parsed]
NonNegative = Annotated[float, Field(ge=0.0), Parsed]
# Strict: pydantic would take 3.0, "3" and true for whole numbers.
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: immutable, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

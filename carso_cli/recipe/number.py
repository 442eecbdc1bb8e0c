"""The one number type of recipes: `8/255`, `1e-3`, `0.1` and `3` all mean a float."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

_PLAIN = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(rf"\s*({_PLAIN})\s*(?:/\s*({_PLAIN})\s*)?")


def parse_number(value: object) -> float:
    """Read a number or a fraction of two numbers.

    YAML 1.1 reads `1e-3` and `8/255` as text, hence this parser; nothing is evaluated.

    Args:
        value: An int, a float, or text such as `"8/255"` or `"1e-3"`.

    Raises:
        ValueError: If it is not a finite number or a fraction with a non-zero denominator.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number or a fraction")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise ValueError("not a number or a fraction")
        denominator = float(match[2]) if match[2] else 1.0
        if denominator == 0:
            raise ValueError("the denominator is zero")
        value = float(match[1]) / denominator
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("the number is not finite")
    return number


def too_large(eps: float, norm: str) -> str:
    """Say what is wrong with a radius of more than the whole range of pixels, such as 8 for 8/255.

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


Number = Annotated[float, BeforeValidator(parse_number)]

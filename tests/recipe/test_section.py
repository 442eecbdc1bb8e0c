"""The number type of recipes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carso_cli.recipe.section import parse_number


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("8/255", 8 / 255),
        (" 8 / 255 ", 8 / 255),
        ("-1/4", -0.25),
        ("1e-3/2", 0.0005),
        ("1e-3", 0.001),
        ("4.346E-4", 4.346e-4),
        (".5", 0.5),
        ("3.", 3.0),
        (0.25, 0.25),
        (3, 3.0),
        ("+2", 2.0),
    ],
)
def test_numbers_and_fractions_are_read(written: object, number: float) -> None:
    parsed = parse_number(written)
    assert parsed == number
    assert isinstance(parsed, float)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        *((text, "not a number or a fraction") for text in ("", "ten", "8/", "/255", "1/2/3", "1 2", "0x10")),
        *((text, "not a number or a fraction") for text in ("nan", "inf", "1e")),
        *((other, "not a number or a fraction") for other in (True, False, None, [1], {"a": 1})),
        *((large, "not finite") for large in (math.nan, math.inf, -math.inf, "1e999", 10**400)),
        *((fraction, "denominator is zero") for fraction in ("1/0", "1/0.0", "0/0")),
    ],
)
def test_what_is_no_finite_number_is_refused(written: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_number(written)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_survives_being_written(value: float) -> None:
    assert parse_number(repr(value)) == value

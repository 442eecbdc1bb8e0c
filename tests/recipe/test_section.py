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


@pytest.mark.parametrize("written", ["", "ten", "8/", "/255", "1/2/3", "1 2", "0x10", "nan", "inf", "1e"])
def test_other_text_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="not a number or a fraction"):
        parse_number(written)


@pytest.mark.parametrize("written", [True, False, None, [1], {"a": 1}])
def test_other_types_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="not a number or a fraction"):
        parse_number(written)


@pytest.mark.parametrize("written", [math.nan, math.inf, -math.inf, "1e999", 10**400])
def test_numbers_that_are_not_finite_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="not finite"):
        parse_number(written)


@pytest.mark.parametrize("written", ["1/0", "1/0.0", "0/0"])
def test_a_zero_denominator_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="denominator is zero"):
        parse_number(written)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_survives_being_written(value: float) -> None:
    assert parse_number(repr(value)) == value

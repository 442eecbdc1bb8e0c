"""Pictures: what is plotted, that files are what they say, that colours can be told apart."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image, ImageOps

from carso_cli.pictures.curves import DARK, LIGHT, Curve, Picture, Point, Style, render

CURVE = Curve("attacked", (Point(1.0, 0.5, 0.3, 0.7), Point(8.0, 0.25, 0.1, 0.4)))
PICTURE = Picture("t", [CURVE], "N", scale="doubling")


def axes_of(picture: Picture) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture.draw(axes)
    return axes


def test_intervals_reach_from_low_to_high() -> None:
    axes = axes_of(PICTURE)
    curve, first, second = axes.lines
    assert [(list(bar.get_xdata()), list(bar.get_ydata())) for bar in (first, second)] == [
        ([1.0, 1.0], [0.3, 0.7]),
        ([8.0, 8.0], [0.1, 0.4]),
    ]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([1.0, 8.0], [0.5, 0.25])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "8"]
    left, right = axes.get_xlim()
    assert 0.8 < left < 1.0
    assert 8.0 < right < 10.0


def test_the_axis_holds_every_point_and_little_more() -> None:
    axes = axes_of(Picture("t", [Curve("a", (Point(0.0, 1.0), Point(0.1, 0.5)))], "eps"))
    assert axes.get_xlim() == pytest.approx((-0.005, 0.105))


def test_no_interval_lies_outside_of_the_picture() -> None:
    low, high = axes_of(Picture("t", [CURVE, CURVE], "N")).get_ylim()
    assert low < 0.1
    assert 0.7 < high < 0.8


def test_a_picture_without_a_neighbour_leaves_no_empty_place() -> None:
    drawn = Image.open(io.BytesIO(render([PICTURE] * 3))).convert("L")
    lower = drawn.crop((0, drawn.height // 2, drawn.width, drawn.height))
    # In the middle: as far from the left edge as from the right one, but for the labels of its axis.
    left, _, right, _ = ImageOps.invert(lower).getbbox() or (0, 0, 0, 0)
    assert abs(left - (drawn.width - right)) < drawn.width // 10


def test_choices_are_drawn_from_top_to_bottom() -> None:
    clean = Curve("clean", (Point("all", 0.9, 0.8, 0.95), Point("last", 0.4)))
    attacked = Curve("attacked", (Point("last", 0.2, 0.1, 0.3),))
    axes = axes_of(Picture("t", [clean, attacked], "accuracy", scale="choice"))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["all", "last"]
    assert axes.yaxis_inverted()
    points, interval, others, _ = axes.lines
    assert list(interval.get_xdata()) == [0.8, 0.95]
    assert list(points.get_xdata()) == [0.9, 0.4]
    assert (list(points.get_ydata()), list(others.get_ydata())) == ([0, 1], [1])
    heights = [line.get_transform().transform((0.0, 1.0))[1] for line in (points, others)]
    assert heights[0] > axes.transData.transform((0.0, 1.0))[1] > heights[1]


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_files_are_what_they_say_and_always_the_same(style: Style) -> None:
    png, svg = render([PICTURE], "png", style), render([PICTURE], "svg", style)
    pdf = render([PICTURE], "pdf", style)
    assert pdf.startswith(b"%PDF-")
    assert render([PICTURE], "pdf", style) == pdf
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    corner = image.convert("RGB").getpixel((0, 0))
    assert corner == tuple(int(style.paper[place : place + 2], 16) for place in (1, 3, 5))
    assert svg.lstrip().startswith(b"<?xml")
    assert render([PICTURE], "svg", style) == svg


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_series_stand_out_from_the_page_and_from_each_other(style: Style) -> None:
    lights = [_luminance(colour) for colour in style.colours]
    page = _luminance(style.paper)
    for light in lights[:4]:
        assert (max(light, page) + 0.05) / (min(light, page) + 0.05) >= 2.5
    assert len(set(style.colours)) == len(style.colours)


def _luminance(colour: str) -> float:
    """Relative luminance of the WCAG."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

"""Pictures: what is plotted, that files are what they say, that colours can be told apart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from carso_cli.pictures.curves import (
    DARK,
    LIGHT,
    Picture,
    Style,
    bars_picture,
    curves_picture,
    render,
    save_pictures,
    training_pictures,
)
from carso_cli.pictures.points import Bar, Curve, Point

METRICS = [
    {
        "epoch": epoch,
        "loss": 900.0 / (epoch + 1),
        "bce": 890.0 / (epoch + 1),
        "kl": 3.0,
        "beta": 0.1 * epoch,
        "learning_rate": 1e-3,
        "defence_clean_accuracy": 0.5 + 0.04 * epoch,
    }
    for epoch in range(10)
]
CURVE = Curve("attacked", (Point(1.0, 0.5, 0.3, 0.7), Point(8.0, 0.25, 0.1, 0.4)))


def axes_of(picture: Picture) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture.draw(axes, LIGHT)
    return axes


def test_training_curves_show_every_quantity_from_epoch_one() -> None:
    pictures = {picture.name: picture for picture in training_pictures(METRICS)}
    assert list(pictures) == [f"training-{name}" for name in ("loss", "kl", "beta", "rate", "accuracy")]
    loss, bce = axes_of(pictures["training-loss"]).lines
    assert list(loss.get_xdata()) == list(range(1, 11))
    assert list(loss.get_ydata()) == [line["loss"] for line in METRICS]
    assert list(bce.get_ydata()) == [line["bce"] for line in METRICS]


def test_no_epochs_no_pictures_and_no_held_out_images_no_accuracy() -> None:
    assert training_pictures([]) == []
    without = [line | {"defence_clean_accuracy": None} for line in METRICS]
    assert [picture.name for picture in training_pictures(without)][-1] == "training-rate"


def test_intervals_reach_from_low_to_high() -> None:
    axes = axes_of(curves_picture("samples", "t", [CURVE], label="N", doubling=True))
    first, second, curve = axes.lines
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
    axes = axes_of(curves_picture("eps", "t", [Curve("a", (Point(0.0, 1.0), Point(0.1, 0.5)))], label="eps"))
    assert axes.get_xlim() == pytest.approx((-0.005, 0.105))


def test_bars_are_drawn_from_top_to_bottom() -> None:
    clean, attacked = [Bar("all", 0.9, 0.8, 0.95), Bar("last", 0.4)], [Bar("last", 0.2)]
    groups = [("clean", clean), ("attacked", attacked)]
    axes = axes_of(bars_picture("layers", "t", groups, label="accuracy"))
    named = {
        label.get_text(): place
        for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    assert named["all"] > named["last"]
    interval, points, others = axes.lines
    assert list(interval.get_xdata()) == [0.8, 0.95]
    assert list(points.get_xdata()) == [0.9, 0.4]
    assert list(points.get_ydata()) == pytest.approx([named["all"] + 0.12, named["last"] + 0.12])
    assert list(others.get_ydata()) == pytest.approx([named["last"] - 0.12])


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_files_are_what_they_say_and_always_the_same(style: Style) -> None:
    pictures = [curves_picture("samples", "t", [CURVE], label="N")]
    png, svg = render(pictures, "png", style), render(pictures, "svg", style)
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    corner = image.convert("RGB").getpixel((0, 0))
    assert corner == tuple(int(style.paper[place : place + 2], 16) for place in (1, 3, 5))
    assert svg.lstrip().startswith(b"<?xml")
    assert render(pictures, "svg", style) == svg


def test_saved_as_png_and_svg(tmp_path: Path) -> None:
    paths = save_pictures(tmp_path, "training", training_pictures(METRICS))
    assert [path.name for path in paths] == ["training.png", "training.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.png", "training.svg"]


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

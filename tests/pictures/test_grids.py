"""Grids of images and single images."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from carso_cli.errors import UsageError
from carso_cli.pictures.grids import amplified, decision_caption, render_grid, save_grid, save_image


def test_no_change_is_mid_grey_and_the_largest_black_or_white() -> None:
    change = torch.tensor([-0.1, 0.0, 0.05, 0.1, 0.3]).reshape(1, 1, 1, 5)
    assert amplified(change, 0.1).flatten().tolist() == pytest.approx([0.0, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_image_reads_back_as_it_was(tmp_path: Path, channels: int) -> None:
    image = torch.linspace(0.0, 1.0, channels * 4 * 5).reshape(channels, 4, 5)
    path = tmp_path / "image.png"
    save_image(path, image)
    read = Image.open(path)
    assert read.size == (5, 4)
    assert read.mode == {1: "L", 3: "RGB"}[channels]
    first = read.getpixel((1, 0))
    expected = tuple((image[:, 0, 1] * 255).round().int().tolist())
    assert (first if channels == 3 else (first,)) == expected


@pytest.mark.parametrize(
    ("label", "decision", "caption"),
    [
        ("3", "8", "3 > 8"),
        ("frog", "truck", "frog > truck"),
        ("horse", "truck", "horse\n> truck"),
        ("airplane", "automobile", "airplane\n> automobi…"),
    ],
)
def test_long_names_stand_on_two_lines(label: str, decision: str, caption: str) -> None:
    assert decision_caption(label, decision) == caption


def test_names_are_no_formulas_and_no_markup() -> None:
    images = torch.zeros(1, 1, 8, 8)
    drawn = render_grid([("$\\frac$", images)], ["<script>$\\x$"], "svg").decode()
    assert "script>" not in drawn.replace("&lt;script&gt;", "")


def test_colours_stand_where_they_belong_and_paper_around_them() -> None:
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 1.0
    grey = torch.full((2, 1, 8, 8), 0.25)
    drawn = Image.open(io.BytesIO(render_grid([("red", red), ("grey", grey)], ["a", "b"], paper="#102030")))
    pixels = drawn.convert("RGB")
    assert pixels.getpixel((1, 1)) == (16, 32, 48)
    right = pixels.width - pixels.width // 6
    assert pixels.getpixel((right, pixels.height // 3)) == (255, 0, 0)
    assert pixels.getpixel((right, pixels.height - pixels.height // 6)) == (64, 64, 64)


def test_rows_of_different_lengths_and_empty_grids_are_refused(tmp_path: Path) -> None:
    for rows in (
        [("a", torch.zeros(2, 1, 4, 4)), ("b", torch.zeros(1, 1, 4, 4))],
        [("a", torch.zeros(0, 1, 4, 4))],
    ):
        with pytest.raises(UsageError, match=r"rows of one length, not \["):
            save_grid(tmp_path / "grid.png", rows)
    assert list(tmp_path.iterdir()) == []

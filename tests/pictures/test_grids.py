"""Grids of images and single images."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from carso_cli.errors import UsageError
from carso_cli.pictures.curves import KINDS
from carso_cli.pictures.grids import Row, amplified, marked, render_grid, save_grid, save_image


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
    ("label", "decision", "shown"),
    [
        ("5", "6", "✗ 6"),
        ("cat", "cat", "✓ cat"),
        ("airplane", "a-long-class-name", "✗ a-long-cla…"),
        (None, "cat", "cat"),
    ],
)
def test_a_decision_is_marked_as_right_or_wrong(label: str | None, decision: str, shown: str) -> None:
    text, colour = marked(label, decision)
    assert text == shown
    assert (colour is None) == (label is None)
    assert marked("a", "a")[1] != marked("a", "b")[1]


def test_a_grid_names_classes_and_decisions() -> None:
    images = torch.zeros(2, 1, 8, 8)
    rows = [Row("clean", images, ["cat", "dog"]), Row("perturbed", images, ["cat", "cat"], perturbed=True)]
    drawn = render_grid(rows, ["cat", "dog"], "svg").decode()
    # matplotlib writes each text into a comment beside its glyphs.
    assert [drawn.count(f"<!-- {text} -->") for text in ("cat", "dog", "✓ cat", "✓ dog", "✗ cat")] == [
        *(1, 1, 2, 1, 1)
    ]
    # Only the perturbed row is framed: four sides for each image.
    assert drawn.count("stroke: #d55e00") == 8


def test_names_are_no_formulas_and_no_markup() -> None:
    rows = [Row("$\\frac$", torch.zeros(1, 1, 8, 8), ["<b>$"])]
    drawn = render_grid(rows, ["<script>$\\x$"], "svg").decode()
    assert "script>" not in drawn.replace("&lt;script&gt;", "")


def test_a_grid_is_written_in_every_format(tmp_path: Path) -> None:
    rows = [Row("clean", torch.rand(2, 3, 8, 8), ["1", "2"])]
    save_grid(tmp_path / "grid.png", rows, ["1", "1"])
    heads = {path.suffix: path.read_bytes()[:5] for path in tmp_path.iterdir()}
    assert heads[".pdf"] == b"%PDF-"
    assert heads[".svg"] == b"<?xml"
    assert heads[".png"][1:4] == b"PNG"
    assert [render_grid(rows, (), kind) for kind in KINDS] == [render_grid(rows, (), kind) for kind in KINDS]


def test_colours_stand_where_they_belong_and_paper_around_them() -> None:
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 1.0
    grey = torch.full((2, 1, 8, 8), 0.25)
    drawn = Image.open(
        io.BytesIO(render_grid([Row("red", red), Row("grey", grey)], ["a", "b"], paper="#102030"))
    )
    pixels = drawn.convert("RGB")
    assert pixels.getpixel((1, 1)) == (16, 32, 48)
    right = pixels.width - pixels.width // 6
    assert pixels.getpixel((right, pixels.height // 3)) == (255, 0, 0)
    assert pixels.getpixel((right, pixels.height - pixels.height // 6)) == (64, 64, 64)


def test_rows_of_different_lengths_and_empty_grids_are_refused(tmp_path: Path) -> None:
    for rows in (
        [Row("a", torch.zeros(2, 1, 4, 4)), Row("b", torch.zeros(1, 1, 4, 4))],
        [Row("a", torch.zeros(0, 1, 4, 4))],
        [Row("a", torch.zeros(2, 1, 4, 4), ["one"])],
    ):
        with pytest.raises(UsageError, match=r"rows of one length, not \["):
            save_grid(tmp_path / "grid.png", rows)
    assert list(tmp_path.iterdir()) == []

"""A user's own image files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from carso_cli.data.image_files import read_images
from carso_cli.errors import DataError, UsageError
from carso_cli.io import files

WriteImage = Callable[..., Path]


def test_files_come_in_the_order_named_as_pixels_in_the_unit_interval(
    tmp_path: Path, write_image: WriteImage
) -> None:
    white = write_image(tmp_path / "a.png", 255)
    dark = write_image(tmp_path / "b.png", 51)
    pixels = read_images([dark, str(white)], channels=3, image_size=32)
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[:, 0, 0, 0], torch.tensor([0.2, 1.0]))
    assert read_images([white], channels=1, image_size=32).shape == (1, 1, 32, 32)


def test_another_size_needs_resize(tmp_path: Path, write_image: WriteImage) -> None:
    large = write_image(tmp_path / "large.png", 200, size=48)
    with pytest.raises(DataError, match=r"large\.png is 48x48; 32x32 is needed") as caught:
        read_images([large], channels=3, image_size=32)
    assert "--resize" in caught.value.hint
    resized = read_images([large], channels=3, image_size=32, resize=True)
    assert torch.equal(resized, torch.full((1, 3, 32, 32), 200 / 255))


def test_every_unusable_file_is_named_at_once(tmp_path: Path, write_image: WriteImage) -> None:
    good = write_image(tmp_path / "good.png")
    empty = tmp_path / "empty.png"
    empty.touch()
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(DataError) as caught:
        read_images([good, empty, text, tmp_path / "god.png", tmp_path], channels=3, image_size=32)
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{empty} is empty (0 bytes)"
    assert lines[1].startswith(f"{text} is not a readable image")
    assert lines[2] == f"{tmp_path / 'god.png'} does not exist"
    assert lines[3] == f"{tmp_path} cannot be read: it is a folder; a file is needed"
    assert "did you mean 'good.png'" in caught.value.hint


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"and 3 more files$"):
        read_images([tmp_path / f"{number}.png" for number in range(8)], channels=3, image_size=32)


def test_no_files_and_huge_files_are_refused(
    tmp_path: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no image file is named"):
        read_images([], channels=3, image_size=32)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    file = write_image(tmp_path / "a.png", pixels=noise)
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    size = f"{file.stat().st_size:,}"
    with pytest.raises(
        DataError, match=rf"a\.png cannot be read: it has {size} bytes; at most 100 are allowed"
    ):
        read_images([file], channels=3, image_size=32)


def test_a_pipe_is_refused_instead_of_waited_for() -> None:
    with pytest.raises(DataError, match="/dev/null cannot be read: it is a pipe or device"):
        read_images(["/dev/null"], channels=3, image_size=32)

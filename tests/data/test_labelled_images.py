"""Labelled images from folders, zip files, arrays and names: sizes, channels, balanced choices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carso_cli.data.datasets import DATASETS
from carso_cli.data.labelled_images import NAMED, describe, load_labelled
from carso_cli.errors import DataError, UsageError
from carso_cli.runtime.reporter import SILENT


def photos(folder: Path, sizes: tuple[tuple[int, int], ...] = ((9, 6), (9, 6)), mode: str = "RGB") -> Path:
    noise = np.random.default_rng(0)
    for label, name in enumerate(("apple", "bean")):
        (folder / name).mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{label}{number}.png")
    return folder


def test_a_folder_keeps_its_aspect_and_says_the_order_of_classes(tmp_path: Path, recorder: Any) -> None:
    found = load_labelled(str(photos(tmp_path / "p")), reporter=recorder)
    assert found.images.shape == (4, 3, 6, 9)
    assert found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.classes == ("apple", "bean")
    assert "0 apple, 1 bean" in recorder.said[0]
    assert describe(found) == "4 colour images of 9x6 pixels, 3 channels, 2 of 2 classes ('apple', 'bean')"
    assert float(found.pixels.max()) <= 1.0


def test_the_test_split_of_a_folder_or_zip(
    two_splits: Path, zip_up: Callable[..., Path], tmp_path: Path
) -> None:
    for source in (two_splits, zip_up(two_splits, tmp_path / "all.zip", "lead/")):
        found = load_labelled(str(source), reporter=SILENT)
        assert found.labels.tolist() == [0, 0, 1, 1, 1]
        assert found.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 12]


def test_several_sizes_are_refused_or_resized(tmp_path: Path) -> None:
    source = str(photos(tmp_path / "p", ((9, 6), (9, 6), (12, 12))))
    with pytest.raises(DataError) as caught:
        load_labelled(source, reporter=SILENT)
    assert "2 sizes: 9x6 (4 images" in caught.value.message
    assert "12x12 (2 images" in caught.value.message
    assert "--resize N" in caught.value.hint
    assert load_labelled(source, reporter=SILENT, resize=8).images.shape == (6, 3, 8, 8)


def test_a_limit_is_balanced_and_keeps_positions(tmp_path: Path) -> None:
    images = torch.arange(30, dtype=torch.uint8).reshape(30, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    torch.save({"images": images, "labels": torch.arange(30) // 10}, tmp_path / "a.pt")
    found = load_labelled(str(tmp_path / "a.pt"), reporter=SILENT, limit=6, seed=1)
    assert found.labels.bincount().tolist() == [2, 2, 2]
    assert found.images[:, 0, 0, 0].tolist() == found.indices.tolist()
    again = load_labelled(str(tmp_path / "a.pt"), reporter=SILENT, limit=6, seed=1)
    assert torch.equal(again.indices, found.indices)


def test_grey_images_go_both_ways_and_colour_stays(tmp_path: Path) -> None:
    grey = load_labelled(str(photos(tmp_path / "g", mode="L")), reporter=SILENT)
    assert grey.grey
    assert grey.with_channels(1).images.shape == (4, 1, 6, 9)
    assert torch.equal(grey.with_channels(1).with_channels(3).images, grey.images)
    colour = load_labelled(str(photos(tmp_path / "c")), reporter=SILENT)
    assert colour.with_channels(1) is colour


def test_names_of_data_sets(recorder: Any) -> None:
    assert {*NAMED, "image-folder"} == set(DATASETS)
    found = load_labelled("digits", reporter=recorder, limit=20)
    assert found.images.shape == (20, 1, 8, 8)
    assert load_labelled("digits", reporter=recorder, limit=20, resize=16).images.shape == (20, 1, 16, 16)


def test_a_source_that_names_nothing() -> None:
    with pytest.raises(UsageError) as caught:
        load_labelled("digit", reporter=SILENT)
    assert caught.value.message == "digit is no folder, no file and no data set"
    assert "did you mean 'digits'" in caught.value.hint


def test_arrays_are_cropped_and_resized(tmp_path: Path, recorder: Any) -> None:
    images = torch.zeros(2, 3, 4, 8)
    images[..., 2:6] = 1.0
    torch.save({"images": images, "labels": torch.tensor([0, 1])}, tmp_path / "a.pt")
    found = load_labelled(str(tmp_path / "a.pt"), reporter=recorder, resize=6)
    assert found.images.shape == (2, 3, 6, 6)
    assert float(found.images.min()) == pytest.approx(1.0)
    assert "8x4 pixels are resized to 6x6" in recorder.said[-1]


def test_classes_are_numbered_as_in_training(two_splits: Path) -> None:
    shutil.rmtree(two_splits / "test" / "bird")
    with pytest.raises(DataError, match="the splits hold different classes"):
        load_labelled(str(two_splits), reporter=SILENT)


def test_a_folder_without_a_test_split_names_what_to_use(two_splits: Path) -> None:
    shutil.move(two_splits / "test", two_splits / "check")
    with pytest.raises(DataError) as caught:
        load_labelled(str(two_splits), reporter=SILENT)
    assert f"--data {two_splits / 'check'} or {two_splits / 'train'}" in caught.value.hint
    assert len(load_labelled(str(two_splits / "check"), reporter=SILENT)) == 5

"""The digits: a split by rule, and an enlargement that agrees with its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from carso_cli.data.digits import load_digits_split


def reference_enlargement(small: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation between pixel centres in float64, written out per axis."""
    centres = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
    low = np.minimum(centres.astype(int), 6)
    part = centres - low
    weights = np.zeros((size, 8))
    weights[np.arange(size), low] = 1 - part
    weights[np.arange(size), low + 1] += part
    return np.asarray(weights @ small @ weights.T)


@pytest.mark.parametrize("size", [28, 32, 45])
def test_enlargement_is_bilinear_between_pixel_centres(size: int) -> None:
    part = load_digits_split("test", channels=1, image_size=size)
    bunch = load_digits()
    position = int(np.flatnonzero(bunch.target == part.labels[0].item())[4])
    expected = reference_enlargement(bunch.images[position] / 16, size) * 255
    assert part.images.shape == (355, 1, size, size)
    assert np.abs(part.images[0, 0].numpy() - expected).max() <= 0.5 + 1e-9


def test_the_splits_are_stratified_about_80_to_20_and_share_no_image() -> None:
    train = load_digits_split("train", channels=3, image_size=32)
    test = load_digits_split("test", channels=3, image_size=32)
    assert (len(train), len(test)) == (1442, 355)
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert float(share.min()) > 0.19
    assert float(share.max()) < 0.21
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_the_images_use_the_whole_range_and_equal_channels() -> None:
    train = load_digits_split("train", channels=3, image_size=32)
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    assert train.classes == tuple("0123456789")
    assert torch.equal(train.indices, torch.arange(1442))


def test_the_split_ignores_the_global_seed() -> None:
    first = load_digits_split("test", channels=1, image_size=32)
    torch.manual_seed(99)
    assert torch.equal(first.images, load_digits_split("test", channels=1, image_size=32).images)

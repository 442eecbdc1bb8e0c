"""scikit-learn's handwritten digits, enlarged: a data set that needs no download.

1797 grey images of 8x8 pixels and 17 levels (the test part of UCI's "Optical Recognition of
Handwritten Digits", Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from carso_cli.data.image_set import ImageSet

_LEVELS = 16
_TEST_EVERY = 5


def load_digits_split(split: str, *, channels: int, image_size: int) -> ImageSet:
    """Load a split of the digits, enlarged bilinearly to `image_size`.

    The split is a rule, not a draw: within each class, every fifth image (the 5th, 10th, ...)
    is a test image. It never depends on a seed or on the release of a library.

    Args:
        split: `"train"` (1442 images) or `"test"` (355).
        channels: 1, or 3 equal ones.
        image_size: Height and width in pixels.
    """
    # Not at the top: no other data set needs scikit-learn.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    # How many images of its own class come before each.
    place = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0] - 1
    is_test = place % _TEST_EVERY == _TEST_EVERY - 1
    chosen = is_test if split == "test" else ~is_test
    small = torch.from_numpy(np.asarray(bunch.images, dtype=np.float64))[chosen][:, None] / _LEVELS
    large = F.interpolate(small, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8).repeat(1, channels, 1, 1)
    return ImageSet(images, labels[chosen], torch.arange(len(images)), tuple("0123456789"))

from __future__ import annotations

import torch

from carso_cli.data.augmentation import MARGIN, augment


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Move an image by whole pixels, filling with zeros."""
    height, width = image.shape[1:]
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


def test_every_image_is_moved_by_its_own_offset() -> None:
    images = torch.rand(6, 2, 9, 9)
    moved = augment(images, flip=False, generator=torch.Generator().manual_seed(3))
    offsets = []
    for image, result in zip(images, moved, strict=True):
        found = [
            (down, right)
            for down in range(-MARGIN, MARGIN + 1)
            for right in range(-MARGIN, MARGIN + 1)
            if torch.equal(shifted(image, down, right), result)
        ]
        assert len(found) == 1
        offsets += found
    assert len(set(offsets)) > 1


def test_mirrors_about_half_of_the_images() -> None:
    # A ramp from left to right still rises after a shift, and falls after a mirroring.
    ramp = torch.linspace(0.1, 1, 16).expand(400, 1, 16, 16)
    result = augment(ramp, flip=True, generator=torch.Generator().manual_seed(0))
    middle = result[:, 0, 8]
    falls = middle[:, 7] > middle[:, 8]
    assert 160 < int(falls.sum()) < 240
    plain = augment(ramp, flip=False, generator=torch.Generator().manual_seed(0))[:, 0, 8]
    assert not bool((plain[:, 7] > plain[:, 8]).any())


def test_the_generator_decides_everything() -> None:
    images = torch.rand(4, 3, 12, 12)
    first, again, other = (
        augment(images, flip=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.is_contiguous()

"""Labelled images in memory, their subsets, and their batches.

- `ImageSet` holds one split;
- `balanced_subset` serves `--limit`, `split_holdout` keeps images out of training. Both depend on the seed
  alone and keep each image's `indices` entry, its position in the full split, so that results can be matched;
- `epoch_batches` shuffles for training, `ordered_batches` keeps the order for everything else.

Axes: M images, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carso_cli.errors import DataError, UsageError
from carso_cli.io.checksum import fingerprint
from carso_cli.runtime.seed import generator


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split, or a part of one.

    Args:
        images: (M, channels, H, W), uint8, or float32 in [0, 1] where pixels are finer.
        labels: int64 (M,), each in `range(len(classes))`.
        indices: int64 (M,), position of each image in the full split.
        classes: Name of each class, in label order.

    Raises:
        DataError: If the tensors disagree in length or kind, or a label has no class.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype not in (torch.uint8, torch.float32) or self.images.ndim != 4:
            kind, shape = self.images.dtype, tuple(self.images.shape)
            raise DataError(f"images are {kind} of shape {shape}; uint8 (M, channels, H, W) is needed")
        # Also where a pixel is NaN, which compares as false: an attack would never leave it.
        if self.images.is_floating_point() and not bool(((self.images >= 0) & (self.images <= 1)).all()):
            raise DataError("images are torch.float32 with pixels outside [0, 1], or NaN")
        for key, values in (("labels", self.labels), ("indices", self.indices)):
            # Labels index tensors: torch would take uint8 ones for a mask.
            if values.dtype != torch.int64 or values.shape != (len(self.images),):
                kind, shape = values.dtype, tuple(values.shape)
                raise DataError(f"{key} are {kind} of shape {shape}; int64 ({len(self.images)},) is needed")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            low, high = int(self.labels.min()), int(self.labels.max())
            raise DataError(f"labels run from {low} to {high}; there are {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    def select(self, positions: Tensor) -> ImageSet:
        """Return the images at these positions (int64, any order), their `indices` kept."""
        return ImageSet(self.images[positions], self.labels[positions], self.indices[positions], self.classes)

    def pixels(self, positions: Tensor | slice) -> Tensor:
        """Return images as float32 (B, channels, H, W) in [0, 1]."""
        chosen = self.images[positions]
        # `to` has copied the pixels, so that dividing in place leaves `images` alone.
        return chosen if chosen.is_floating_point() else chosen.to(torch.float32).div_(255.0)

    def some(self, count: int) -> ImageSet:
        """Return at most `count` images, evenly spread over the set."""
        return self.select(torch.linspace(0, len(self) - 1, min(count, len(self))).round().long())

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the same set with its images on a device; labels and indices stay on the CPU."""
        return replace(self, images=self.images.to(device))

    def fingerprint(self) -> str:
        """Return the SHA-256 of images, labels and positions."""
        return fingerprint({"images": self.images, "labels": self.labels, "indices": self.indices})


def balanced_subset(image_set: ImageSet, count: int, seed: int) -> ImageSet:
    """Take `count` images, as many of each class as the classes allow.

    Class counts differ by at most 1 unless a class has no more images to give. The result is
    the beginning of one seeded order of the whole set, so a smaller subset is always the
    beginning of a larger one, and its first C images are one of each class. A count beyond
    the size of the set returns every image.

    Raises:
        UsageError: If `count` is below 1.
    """
    if count < 1:
        raise UsageError(f"a subset of {count} images was asked for; at least 1 is needed")
    noise = generator(seed, "balanced-subset")
    rank = _rank_in_class(image_set.labels, noise)
    shuffled = torch.randperm(len(image_set), generator=noise)
    # First one image of each class, then a second of each, and so on.
    # Stable, or torch may order the images of one rank by another rule, and change it with a release.
    order = shuffled[torch.argsort(rank[shuffled], stable=True)]
    return image_set.select(order[:count])


def split_holdout(image_set: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split off a stratified share of the images, at least one when `share` is above 0.

    Every class keeps at least one image in the first part.

    Returns:
        The images that stay, and the `share` held out; both in the order of `image_set`.

    Raises:
        UsageError: If `share` is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise UsageError(f"a share of {share} was to be held out; it must be at least 0 and below 1")
    taken = _holdout_counts(torch.bincount(image_set.labels, minlength=len(image_set.classes)), share)
    rank = _rank_in_class(image_set.labels, generator(seed, "holdout"))
    held_out = rank < taken[image_set.labels]
    return image_set.select((~held_out).nonzero()[:, 0]), image_set.select(held_out.nonzero()[:, 0])


def held_out_count(images: int, share: float) -> int:
    """Return how many of so many images `split_holdout` takes, where every class has enough of them."""
    return max(round(share * images), 1) if share else 0


def _holdout_counts(counts: Tensor, share: float) -> Tensor:
    """Distribute the held-out images over classes by largest remainders; (C,) to (C,)."""
    room = (counts - 1).clamp(min=0)  # one image of each class stays
    exact = counts.to(torch.float64) * share
    taken = torch.minimum(exact.floor().long(), room)
    # Of all classes together: what is rounded class by class adds up to another number.
    total = min(held_out_count(int(counts.sum()), share), int(room.sum()))
    order = torch.argsort(exact - exact.floor(), descending=True, stable=True).tolist()
    # Again while some are wanting: classes without room pass theirs on to the others.
    while int(taken.sum()) < total:
        for label in order:
            if int(taken.sum()) < total and taken[label] < room[label]:
                taken[label] += 1
    return taken


def _rank_in_class(labels: Tensor, noise: torch.Generator) -> Tensor:
    """Return each image's place, from 0, in a random order of its own class; (M,) to (M,)."""
    shuffled = torch.randperm(len(labels), generator=noise)
    # Class by class, and by the stable sort in shuffled order within each.
    grouped = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    # The place within a class is that in `grouped`, less where the class begins there.
    rank[grouped] = torch.arange(len(labels)) - first[labels[grouped]]
    return rank


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Cut one epoch's shuffled positions into batches.

    The order depends on `seed` and `epoch` alone, so a resumed run sees the batches of an uninterrupted one.
    A last batch of 1 image is dropped: batch normalisation has no variance to divide by.

    Returns:
        int64 tensors of positions in `range(count)`, each of `batch_size` but perhaps the last.

    Raises:
        UsageError: If `count` or `batch_size` is below 1, or both leave no batch to train on.
    """
    _check_batches(count, batch_size)
    if count == 1 < batch_size:
        raise UsageError("there is 1 image to train on; batch normalisation needs at least 2")
    order = torch.randperm(count, generator=generator(seed, "epoch-order", epoch))
    batches = list(torch.split(order, batch_size))
    if batch_size > 1 and len(batches[-1]) == 1:
        batches.pop()
    return batches


def ordered_batches(count: int, batch_size: int) -> list[slice]:
    """Cut `range(count)` into slices of `batch_size`; the last may be shorter.

    Raises:
        UsageError: If `count` or `batch_size` is below 1.
    """
    _check_batches(count, batch_size)
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def _check_batches(count: int, batch_size: int) -> None:
    if count < 1 or batch_size < 1:
        raise UsageError(f"{count} images in batches of {batch_size}: both must be at least 1")

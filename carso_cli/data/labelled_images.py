"""Labelled images from whatever a user has: a folder or zip of classes, a file of arrays, a data set's name.

    found = load_labelled("photos", reporter=reporter, limit=200)
    found.images, found.labels, found.classes

Images keep the size that they have; all must share one, unless they are resized. Colour is kept where there
is any: images that are grey throughout may be shown to a model of one channel or of three.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.data.arrays import SUFFIXES, read_arrays
from carso_cli.data.datasets import DATASETS, load_split
from carso_cli.data.decode import decode_image
from carso_cli.data.file_tree import FileTree, open_tree
from carso_cli.data.image_folder import Listing, check_other_split, list_split, name_some, warn_of_others
from carso_cli.data.image_set import ImageSet, balanced_subset
from carso_cli.errors import DataError, UsageError, nearest
from carso_cli.io.files import similar_file
from carso_cli.runtime.reporter import Reporter

NAMED = tuple(name for name in DATASETS if name != "image-folder")
"""Data sets that can be named."""

_DIGITS_SIZE = 8
_CLASSES = {
    **{"digits": 10, "mnist": 10, "fashion-mnist": 10},
    **{"cifar10": 10, "cifar100": 100, "tinyimagenet200": 200},
}
_SIZES = {
    **{"digits": _DIGITS_SIZE, "mnist": 28, "fashion-mnist": 28},
    **{"cifar10": 32, "cifar100": 32, "tinyimagenet200": 64},
}


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their true classes.

    Args:
        images: (M, channels, H, W), uint8, or float32 in [0, 1]; 1 or 3 channels.
        labels: (M,) int64 from 0.
        indices: (M,) int64, position of each image in the source, before any was left out.
        classes: Name of each class, in label order.
        source: What was named.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> Tensor:
        """The images as float32 (M, channels, H, W) in [0, 1]."""
        return _pixels(self.images)

    @property
    def grey(self) -> bool:
        """Whether no image has a colour."""
        return self.images.shape[1] == 1 or bool((self.images == self.images[:, :1]).all())

    def with_channels(self, channels: int) -> LabelledImages:
        """Return grey images with 1 channel, or with 3 equal ones; colour images as they are."""
        if not self.grey or channels == self.images.shape[1]:
            return self
        one = self.images[:, :1]
        return replace(self, images=one if channels == 1 else one.expand(-1, 3, -1, -1).contiguous())


def load_labelled(
    source: str,
    *,
    reporter: Reporter,
    limit: int | None = None,
    resize: int | None = None,
    seed: int = 0,
    split: str = "test",
) -> LabelledImages:
    """Load labelled images.

    Args:
        source: A folder or zip file laid out as `<class>/<image>` or `<split>/<class>/<image>` (then its test
            split); a file of arrays (`carso_cli.data.arrays`); or one of `NAMED`, then its test split.
        reporter: Where progress and notes go.
        limit: Only so many images, class-balanced, drawn by the seed; those left out are not decoded.
        resize: Side of a square that each image is cropped to centrally and resized; as they are when None.
        seed: Seed of the choice.
        split: `test` or `train`, where the source has both.

    Raises:
        UsageError: If the source names nothing.
        DataError: If it is damaged, laid out otherwise, or its images differ in size.
    """
    path = Path(os.path.expanduser(source))
    if source in NAMED and not path.exists():
        return _named(source, split, reporter, limit, resize, seed)
    if source in NAMED:
        reporter.info(f"--data {source} is the data set of that name, not {path} here; ./{source} names that")
        return _named(source, split, reporter, limit, resize, seed)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return _arrays(path, source, reporter, limit, resize, seed)
    if not path.exists():
        suggestion = nearest(source, NAMED, limit=1) or similar_file(path)
        raise UsageError(
            f"{source} is no folder, no file and no data set",
            hint="; ".join(filter(None, (suggestion, f"the data sets are {', '.join(NAMED)}"))),
        )
    with open_tree(path) as tree:
        return _folder(tree, source, split, reporter, limit, resize, seed)


def chosen(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Return the (L,) positions of a class-balanced choice of `limit` images; all of them when None."""
    if limit is None:
        return torch.arange(len(labels))
    blank = torch.empty(len(labels), 1, 0, 0, dtype=torch.uint8)
    names = tuple(map(str, range(int(labels.max()) + 1)))
    return balanced_subset(ImageSet(blank, labels, torch.arange(len(labels)), names), limit, seed).indices


def _named(
    name: str, split: str, reporter: Reporter, limit: int | None, resize: int | None, seed: int
) -> LabelledImages:
    # The digits are drawn at any size from the start: nothing is cropped.
    size = resize if resize and name == "digits" else _SIZES[name]
    found = load_split(
        name,
        split,
        classes=_CLASSES[name],
        channels=1 if name == "digits" else 3,
        image_size=size,
        root=None,
        source=None,
        reporter=reporter,
    )
    part = found.select(chosen(found.labels, limit, seed))
    return _resized(
        LabelledImages(part.images, part.labels, part.indices, part.classes, name), resize, reporter
    )


def _arrays(
    path: Path, source: str, reporter: Reporter, limit: int | None, resize: int | None, seed: int
) -> LabelledImages:
    found = read_arrays(path, reporter=reporter)
    assert found.labels is not None
    positions = chosen(found.labels, limit, seed)
    classes = tuple(map(str, range(int(found.labels.max()) + 1)))
    part = LabelledImages(found.images[positions], found.labels[positions], positions, classes, source)
    return _resized(part, resize, reporter)


def _folder(
    tree: FileTree,
    source: str,
    split: str,
    reporter: Reporter,
    limit: int | None,
    resize: int | None,
    seed: int,
) -> LabelledImages:
    listing = _split(tree, split)
    warn_of_others(tree, listing, reporter)
    check_other_split(tree, listing, split, None)
    labels, classes = torch.tensor(listing.labels, dtype=torch.int64), listing.classes
    if all(name.isdecimal() for name in classes) and len(classes) <= max(map(int, classes)):
        # Numbering the folders from 0 would shift every label after the gap.
        numbers = torch.tensor([int(name) for name in classes])
        labels, classes = numbers[labels], tuple(map(str, range(int(numbers.max()) + 1)))
        reporter.warning(
            f"{tree.where(listing.folder)}: class folders have gaps; their numbers are the labels"
        )
    positions = chosen(labels, limit, seed)
    shown = ", ".join(f"{place} {name}" for place, name in enumerate(listing.classes[:5]))
    more = f", … {len(listing.classes) - 1} {listing.classes[-1]}" if len(listing.classes) > 5 else ""
    reporter.info(f"{tree.where(listing.folder)}: classes in this order: {shown}{more}")
    arrays = []
    with reporter.progress(f"decoding {tree.path.name}", total=len(positions)) as progress:
        for position in positions.tolist():
            name = listing.names[position]
            data, where = tree.read(name), tree.where(name)
            arrays.append(
                decode_image(data, name=where, channels=3, image_size=resize, resize=resize is not None)
            )
            progress.advance()
    _check_sizes([array.shape for array in arrays], [listing.names[at] for at in positions.tolist()], tree)
    images = torch.from_numpy(np.stack(arrays))
    return LabelledImages(images, labels[positions], positions, classes, source)


def splits_of(source: str) -> tuple[str, ...]:
    """Return the splits that a source of `load_labelled` has: one of `train` and `test`, or both.

    Raises:
        DataError: If it is a folder or zip file without any.
    """
    path = Path(os.path.expanduser(source))
    if source in NAMED:
        return ("train", "test")
    if path.suffix.lower() in SUFFIXES or not path.exists():
        return ("test",)
    folders: dict[str, str] = {}
    with open_tree(path) as tree:
        for split in ("train", "test"):
            with suppress(DataError):
                folders[split] = list_split(tree, split).folder
        if not folders:
            _split(tree, "test")
    # Class folders without a split serve as either.
    return tuple(folders) if len(set(folders.values())) == 2 else tuple(folders)[-1:]


def _split(tree: FileTree, split: str) -> Listing:
    """List a split, or the only one.

    Raises:
        DataError: If there is none; the hint names the folders that could be meant.
    """
    try:
        return list_split(tree, split)
    except DataError as error:
        inside = [
            name
            for name in tree.subfolders("")
            if any(tree.images(f"{name}/{each}") for each in tree.subfolders(name))
        ]
        if not inside or f"holds no {split} split" not in error.message or tree.path.is_file():
            raise
        raise DataError(
            error.message, hint=f"name one of them: --data {' or '.join(tree.where(name) for name in inside)}"
        ) from None


def _check_sizes(shapes: list[tuple[int, ...]], names: list[str], tree: FileTree) -> None:
    counts = Counter(shapes)
    if len(counts) == 1:
        return
    first = {shape: names[place] for place, shape in reversed(list(enumerate(shapes)))}
    told = [
        f"{shape[2]}x{shape[1]} ({count} images, such as {tree.where(first[shape])})"
        for shape, count in counts.most_common(3)
    ]
    raise DataError(
        f"{tree.path} holds images of {len(counts)} sizes: {', '.join(told)}",
        hint="--resize N crops each to a square and resizes it to NxN pixels; use the model's own size",
    )


def _resized(found: LabelledImages, side: int | None, reporter: Reporter) -> LabelledImages:
    """Return images cropped centrally to a square and resized, where they do not have that size."""
    height, width = found.images.shape[2:]
    if side is None or (height, width) == (side, side):
        return found
    reporter.info(f"{found.source}: images of {width}x{height} pixels are resized to {side}x{side}")
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    cropped = found.images[:, :, top : top + square, left : left + square]
    large = F.interpolate(
        _pixels(cropped), size=(side, side), mode="bicubic", align_corners=False, antialias=True
    )
    return replace(found, images=large.clamp(0.0, 1.0))


def _pixels(images: Tensor) -> Tensor:
    floats = images.to(torch.float32)
    return floats / 255.0 if images.dtype == torch.uint8 else floats


def describe(found: LabelledImages) -> str:
    """Return how many images of what size and how many classes, in words."""
    count, channels, height, width = found.images.shape
    present = len(set(found.labels.tolist()))
    colour = "grey" if found.grey else "colour"
    return (
        f"{count} {colour} images of {width}x{height} pixels, {channels} channel"
        f"{'s' if channels > 1 else ''}, {present} of {len(found.classes)} classes"
        + ("" if len(found.classes) > 5 else f" ({name_some(found.classes)})")
    )

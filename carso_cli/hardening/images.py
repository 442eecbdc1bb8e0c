"""The images of a hardening: those to train on, which include the held-out ones, and those to audit on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from carso_cli.build import load_images
from carso_cli.data.image_set import ImageSet, split_holdout
from carso_cli.data.labelled_images import LabelledImages, describe, load_labelled, splits_of
from carso_cli.errors import DataError, UsageError
from carso_cli.runtime.reporter import Reporter
from carso_cli.tools.target import Target, fit_channels

AUDITED_SHARE = 0.2
"""Share of the images that is kept for the audits, where the source has no test images of its own."""


@dataclass(frozen=True, eq=False)
class HardeningImages:
    """Images to train and to audit on.

    Args:
        train: What the purifier is trained on; its held-out images are taken from it.
        test: What both audits attack; never trained on.
        dataset: Name of the data set, where it can be loaded again by it; otherwise `given`.
    """

    train: ImageSet
    test: ImageSet
    dataset: str = "given"


def load_hardening_images(
    source: str | None, target: Target, *, reporter: Reporter, resize: int | None = None, seed: int = 0
) -> HardeningImages:
    """Load the images of a hardening, with the channels that the target takes.

    Args:
        source: As of `carso audit`; None means the images of the target's recipe. Where it has no test split,
            `AUDITED_SHARE` of it is kept for the audits.
        target: The classifier.
        reporter: Where progress and notes go.
        resize: Side of the square that images are cropped and resized to.
        seed: Seed of the choice.

    Raises:
        UsageError: If nothing is named and the target knows no images, or it takes none of this form.
        DataError: If the images are missing or damaged, or too few.
    """
    recipe = target.recipe
    if source is None and recipe is None:
        raise UsageError(
            f"{target.name} says nothing about its images",
            hint="name images to train on with --data: a folder, a zip or array file, or a data set such as "
            "cifar10",
        )
    if recipe is not None and resize is None and source in (None, recipe.data.name):
        train, test = (load_images(recipe, split, reporter=reporter) for split in ("train", "test"))
        return HardeningImages(train, test, recipe.data.name)
    assert source is not None
    found = []
    for split in splits_of(source):
        loaded = load_labelled(source, reporter=reporter, resize=resize, seed=seed, split=split)
        fitted = fit_channels(loaded, target)
        reporter.info(f"{source}, {split if len(splits_of(source)) > 1 else 'all'}: {describe(fitted)}")
        found.append(_as_set(fitted))
    if len(found) == 1:
        return split_images(found[0], seed)
    return HardeningImages(found[0], found[1])


def split_images(images: ImageSet, seed: int) -> HardeningImages:
    """Keep a stratified share of images without a test split for the audits.

    Raises:
        DataError: If too few are left on either side.
    """
    train, test = split_holdout(images, AUDITED_SHARE, seed)
    if len(test) < 2 or len(train) < 8:
        raise DataError(
            f"{len(images)} images are too few: some are held out, and {AUDITED_SHARE:.0%} are kept for the "
            "audits",
            hint="give a hundred images or more",
        )
    return HardeningImages(train, test)


def with_classes(images: HardeningImages, classes: int, name: str) -> HardeningImages:
    """Return the images with a name for each class that the classifier knows.

    Raises:
        DataError: If a label is beyond them.
    """

    def named(part: ImageSet) -> ImageSet:
        highest = int(part.labels.max())
        if highest >= classes:
            raise DataError(
                f"the labels run up to {highest}; {name} has {classes} classes, 0 to {classes - 1}",
                hint="class folders are numbered in alphabetical order, or by their names where those are "
                "numbers",
            )
        return replace(part, classes=_padded(part.classes, classes))

    return HardeningImages(named(images.train), named(images.test), images.dataset)


def _padded(names: Sequence[str], count: int) -> tuple[str, ...]:
    return (*names[:count], *map(str, range(len(names), count)))


def _as_set(found: LabelledImages) -> ImageSet:
    return ImageSet(found.images, found.labels, found.indices, found.classes)

"""Images sorted into folders by class: `<split>/<class>/<image>`, in a folder or a zip file.

A source may hold the splits, with or without one folder around them, or be a split itself
(`<class>/<image>`, with or without one folder around it). Classes are numbered in the
alphabetical order of their folders.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from carso_cli.data.cache import load_images
from carso_cli.data.file_tree import FileTree, open_tree
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError
from carso_cli.runtime.reporter import Reporter

SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
"""Folder names, in any case of letters, that count as each split; the first that exists is used."""

_LAYOUT = "lay the images out as <split>/<class>/<image>, or name a folder or zip laid out as <class>/<image>"


@dataclass(frozen=True)
class Listing:
    """The images of one split, before any is decoded.

    Args:
        folder: The split's folder in its tree.
        classes: Class names, in label order.
        names: Names of the images in the tree, class by class.
        labels: Label of each image.
        others: Names of the files beside the images, which are left out.
    """

    folder: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    others: tuple[str, ...] = ()


def load_folder_split(
    path: Path,
    split: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    reporter: Reporter,
    other_path: Path | None = None,
) -> ImageSet:
    """Load one split of an image folder or zip file.

    Args as `carso_cli.data.datasets.load_split`; `other_path` is where the other split lies, if that is not
    `path` and its classes are to be compared.

    Raises:
        DataError: If the layout is another one, a class is empty or missing from one split, their
            number is wrong, or an image is damaged or of another size.
    """
    with open_tree(path) as tree:
        listing = list_split(tree, split)
        where = tree.where(listing.folder)
        # Validation images as test images are a choice that the user should see.
        if listing.folder.rpartition("/")[2].lower() in SPLIT_FOLDERS[split][1:]:
            reporter.info(f"{where} is used as the {split} split")
        warn_of_others(tree, listing, reporter)
        # From the names alone: decoding may take minutes.
        check_class_count(listing.classes, classes, where=where)
        check_other_split(tree, listing, split, other_path)
        return load_listing(tree, listing, split, channels=channels, image_size=image_size, reporter=reporter)


def load_listing(
    tree: FileTree, listing: Listing, split: str, *, channels: int, image_size: int, reporter: Reporter
) -> ImageSet:
    """Load the images of a listing; see `load_folder_split`."""
    images = load_images(
        tree, listing.names, slot=split, channels=channels, image_size=image_size, reporter=reporter
    )
    labels = torch.tensor(listing.labels, dtype=torch.int64)
    return ImageSet(images, labels, torch.arange(len(labels)), listing.classes)


def list_split(tree: FileTree, split: str) -> Listing:
    """Find a split in a tree and list its images without reading any.

    Raises:
        DataError: If the layout is none of those above, or a class has no images.
    """
    folder = _find_named(tree, split) or _find_unnamed(tree, split)
    if folder is None:
        raise DataError(
            f"{tree.path} holds no {split} split; {_told(tree.subfolders(''))}",
            hint=_LAYOUT,
        )
    # It has no label, and to leave it out would change the data set in silence.
    if stray := tree.images(folder):
        message = f"{tree.where(stray[0])} lies beside the class folders, in none of them"
        raise DataError(message, hint=_LAYOUT)
    classes = tuple(tree.subfolders(folder))
    names: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        inside = _join(folder, name)
        found, where = tree.images(inside), tree.where(inside)
        # Its images would be left out in silence.
        if deeper := tree.subfolders(inside):
            raise DataError(f"{where} holds the folder {deeper[0]!r} instead of images alone", hint=_LAYOUT)
        # It would take a label and shift those after it, perhaps in this split alone.
        if not found:
            beside = tree.others(inside)
            raise DataError(
                f"{where} holds no images: the class {name!r} is empty"
                + (f"; it holds {len(beside)} other files, such as {beside[0]!r}" if beside else ""),
                hint="add its images, or remove the folder from both splits",
            )
        names += found
        others += tree.others(inside)
        labels += [label] * len(found)
    return Listing(folder, classes, tuple(names), tuple(labels), tuple(others))


def warn_of_others(tree: FileTree, listing: Listing, reporter: Reporter) -> None:
    """Warn of the files among a listing's images that are left out, with their number by ending."""
    if not listing.others:
        return
    endings = Counter(os.path.splitext(name)[1].lower() or "without ending" for name in listing.others)
    counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
    reporter.warning(
        f"{tree.where(listing.folder)}: {len(listing.others)} of "
        f"{len(listing.others) + len(listing.names)} files are left out, as they are no images that can be "
        f"read ({counts}; such as {listing.others[0]!r})"
    )


def _bases(tree: FileTree) -> list[str]:
    """Return where splits or classes may start: the top, or the one folder that everything lies in."""
    top = tree.subfolders("")
    # Zip files often hold everything in one folder with the name of the data set.
    return ["", *top] if len(top) == 1 and not tree.images("") else [""]


def _find_named(tree: FileTree, split: str) -> str | None:
    for base in _bases(tree):
        for name in SPLIT_FOLDERS[split]:
            # Classes too may be called `test` or `val`; those hold images, no folders.
            for found in tree.subfolders(base):
                if found.lower() == name and tree.subfolders(folder := _join(base, found)):
                    return folder
    return None


def _find_unnamed(tree: FileTree, split: str) -> str | None:
    """Find class folders that lie in no folder named after a split; `""` is the top."""
    others = {name for key, names in SPLIT_FOLDERS.items() if key != split for name in names}
    for base in _bases(tree):
        inside = tree.subfolders(base)
        # It is the other split: training images must not serve as test images, nor the reverse.
        if base.lower() in others or (inside and {name.lower() for name in inside} <= others):
            continue
        if any(tree.images(_join(base, name)) for name in inside):
            return base
    return None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def check_other_split(tree: FileTree, listing: Listing, split: str, other_path: Path | None) -> None:
    """Check the classes against those of the other split, where it is at hand.

    Args:
        tree: Where the split lies.
        listing: The split.
        split: `"train"` or `"test"`.
        other_path: Where the other split lies; in the same tree when None.

    Raises:
        DataError: If either split lacks a class of the other: its labels would count from another list.
    """
    other = "test" if split == "train" else "train"
    # Both keys may name one source, which holds both splits.
    if other_path is not None and other_path.resolve() != tree.path.resolve():
        with open_tree(other_path) as other_tree:
            other_listing = list_split(other_tree, other)
            where = other_tree.where(other_listing.folder)
    elif _find_named(tree, other) is not None:
        other_listing = list_split(tree, other)
        where = tree.where(other_listing.folder)
    else:
        return
    ours, theirs = (listing.classes, tree.where(listing.folder)), (other_listing.classes, where)
    check_same_classes(*((ours, theirs) if split == "train" else (theirs, ours)))


def check_class_count(found: Sequence[str], expected: int, *, where: str) -> None:
    """Check that a split holds as many classes as the recipe states.

    Raises:
        DataError: If it does not.
    """
    if len(found) != expected:
        raise DataError(
            f"{where} holds {len(found)} classes ({name_some(found)}); {expected} are stated",
            hint=f"set data.classes={len(found)}, or put the folders in order",
        )


def check_same_classes(train: tuple[Sequence[str], str], test: tuple[Sequence[str], str]) -> None:
    """Check that both splits hold the same classes in the same order.

    Args:
        train: Class names of the training split, in label order, and where it lies, for the message.
        test: The same of the test split.

    Raises:
        DataError: Naming the classes that either split lacks.
    """
    if tuple(train[0]) == tuple(test[0]):
        return
    lacks = [
        f"{where} lacks {name_some(missing)}"
        for (found, where), (others, _) in ((test, train), (train, test))
        if (missing := [name for name in others if name not in set(found)])
    ]
    raise DataError(
        "the splits hold different classes: " + ("; ".join(lacks) or "the same names in another order"),
        hint="every class needs images in both splits: add what is missing or remove it from the other split",
    )


def _told(folders: Sequence[str]) -> str:
    return f"it holds the folders {name_some(folders)}" if folders else "it holds no folder"


def name_some(names: Sequence[str], limit: int = 5) -> str:
    """List a few names for a message, with a count of the rest."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "none"

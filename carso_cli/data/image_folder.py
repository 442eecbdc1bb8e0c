"""Images sorted into folders by class: `<split>/<class>/<image>`, in a folder or a zip file.

A source may hold the splits, with or without one folder around them, or be a split itself
(`<class>/<image>`, with or without one folder around it). Classes are numbered in the
alphabetical order of their folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from carso_cli.data.cache import load_images
from carso_cli.data.checks import check_class_count, check_same_classes, name_some
from carso_cli.data.file_tree import FileTree, open_tree
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError
from carso_cli.runtime.reporter import Reporter

SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation")}
"""Folder names that count as each split; the first that exists is used."""

_LAYOUT = "lay the images out as <split>/<class>/<image>, or name a folder or zip laid out as <class>/<image>"


@dataclass(frozen=True)
class Listing:
    """The images of one split, before any is decoded.

    Args:
        folder: The split's folder in its tree.
        classes: Class names, in label order.
        names: Names of the images in the tree, class by class.
        labels: Label of each image.
    """

    folder: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]


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

    Args:
        path: The folder or zip file.
        split: `"train"` or `"test"`.
        classes: Number of classes that must be found.
        channels: 1 or 3; images are converted.
        image_size: Height and width that every image must have, in pixels.
        reporter: Where progress and warnings go.
        other_path: Where the other split lies, if that is not `path` and its classes are to be compared.

    Raises:
        DataError: If the layout is another one, a class is empty or missing from one split, their
            number is wrong, or an image is damaged or of another size.
    """
    with open_tree(path) as tree:
        listing = list_split(tree, split)
        where = tree.where(listing.folder)
        if listing.folder.rpartition("/")[2] in SPLIT_FOLDERS[split][1:]:
            reporter.info(f"{where} is used as the {split} split")
        check_class_count(listing.classes, classes, where=where)
        _check_other_split(tree, listing, split, other_path)
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
            f"{tree.path} holds no {split} split; it holds the folders {name_some(tree.subfolders(''))}",
            hint=_LAYOUT,
        )
    prefix = f"{folder}/" if folder else ""
    if stray := tree.images(folder):
        raise DataError(
            f"{tree.where(stray[0])} lies beside the class folders, in none of them", hint=_LAYOUT
        )
    classes = tuple(tree.subfolders(folder))
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = tree.images(prefix + name)
        if deeper := tree.subfolders(prefix + name):
            where = tree.where(prefix + name)
            raise DataError(f"{where} holds the folder {deeper[0]!r} instead of images alone", hint=_LAYOUT)
        if not found:
            raise DataError(
                f"{tree.where(prefix + name)} holds no images: the class {name!r} is empty",
                hint="add its images, or remove the folder from both splits",
            )
        names += found
        labels += [label] * len(found)
    return Listing(folder, classes, tuple(names), tuple(labels))


def _bases(tree: FileTree) -> list[str]:
    """Where splits or classes may start: the top, or the one folder that everything lies in."""
    top = tree.subfolders("")
    return ["", *top] if len(top) == 1 and not tree.images("") else [""]


def _find_named(tree: FileTree, split: str) -> str | None:
    for base in _bases(tree):
        for name in SPLIT_FOLDERS[split]:
            folder = f"{base}/{name}" if base else name
            if name in tree.subfolders(base) and tree.subfolders(folder):
                return folder
    return None


def _find_unnamed(tree: FileTree, split: str) -> str | None:
    """Find class folders that lie in no folder named after a split; `""` is the top."""
    others = {name for key, names in SPLIT_FOLDERS.items() if key != split for name in names}
    for base in _bases(tree):
        inside = tree.subfolders(base)
        if base in others or (inside and set(inside) <= others):
            continue
        if any(tree.images(f"{base}/{name}" if base else name) for name in inside):
            return base
    return None


def _check_other_split(tree: FileTree, listing: Listing, split: str, other_path: Path | None) -> None:
    other = "test" if split == "train" else "train"
    if other_path is not None and other_path.resolve() != tree.path.resolve():
        with open_tree(other_path) as other_tree:
            found = {split: (tree, listing), other: (other_tree, list_split(other_tree, other))}
    elif _find_named(tree, other) is not None:
        found = {split: (tree, listing), other: (tree, list_split(tree, other))}
    else:
        return
    (train_tree, train), (test_tree, test) = found["train"], found["test"]
    check_same_classes(
        train.classes,
        test.classes,
        train_source=train_tree.where(train.folder),
        test_source=test_tree.where(test.folder),
    )

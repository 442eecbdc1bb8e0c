"""Data sets by name: `load_split` loads a split, `find_data` only says where a data set lies.

Both look in `root`, or in the `data` folder of CARSO_HOME where no root is given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from carso_cli.data.cifar import FOLDERS as CIFAR_FOLDERS
from carso_cli.data.cifar import cifar_class, load_cifar_split
from carso_cli.data.digits import load_digits_split
from carso_cli.data.image_folder import load_folder_split
from carso_cli.data.image_set import ImageSet
from carso_cli.data.mnist import FOLDERS as MNIST_FOLDERS
from carso_cli.data.mnist import load_mnist_split
from carso_cli.data.tinyimagenet import find_tinyimagenet, load_tinyimagenet_split
from carso_cli.errors import DataError, UsageError, nearest
from carso_cli.io.files import similar_file
from carso_cli.io.paths import data_home
from carso_cli.runtime.reporter import Reporter

SPLITS = ("train", "test")


@dataclass(frozen=True)
class _Facts:
    """What a data set is by definition; None where the user decides."""

    classes: int | None = None
    image_size: int | None = None
    takes_source: bool = False


DATASETS = {
    # No size: they are enlarged to the one that the recipe states.
    "digits": _Facts(classes=10),
    "cifar10": _Facts(classes=10, image_size=32),
    "cifar100": _Facts(classes=100, image_size=32),
    "mnist": _Facts(classes=10, image_size=28),
    "fashion-mnist": _Facts(classes=10, image_size=28),
    "tinyimagenet200": _Facts(classes=200, image_size=64, takes_source=True),
    "image-folder": _Facts(takes_source=True),
}


def load_split(
    name: str,
    split: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    root: Path | None,
    source: str | None,
    reporter: Reporter,
    other_source: str | None = None,
    folders: Sequence[Path] = (),
) -> ImageSet:
    """Load one split of a data set into memory.

    Args:
        name: One of `DATASETS`.
        split: `"train"` or `"test"`.
        classes: Number of classes stated for the data set.
        channels: 3, or 1 for grey; images are converted.
        image_size: Height and width stated for the images, in pixels.
        root: Folder searched for the data; the `data` folder of CARSO_HOME when None.
        source: For `image-folder` or `tinyimagenet200`: folder or zip file, perhaps relative to `root`.
        reporter: Where progress and warnings go.
        other_source: The other split's `source`, whose class names are compared before decoding.
        folders: Where `source` may lie too, beside `root` and the working directory.

    Raises:
        UsageError, DataError: If what is named is unknown; if images are absent, damaged, or not as stated.
    """
    _check_request(name, split, classes, channels, image_size, source)
    # `os.path` leaves an unknown `~name` as it is, where `Path.expanduser` raises.
    folder = Path(os.path.expanduser(root or data_home()))
    if name == "digits":
        return load_digits_split(split, channels=channels, image_size=image_size)
    if name in CIFAR_FOLDERS:
        return load_cifar_split(name, split, channels=channels, root=folder, reporter=reporter)
    if name in MNIST_FOLDERS:
        return load_mnist_split(name, split, channels=channels, root=folder, reporter=reporter)
    path = resolve_source(source, folder, folders) if source else None
    if name == "tinyimagenet200":
        return load_tinyimagenet_split(
            split,
            classes=classes,
            channels=channels,
            image_size=image_size,
            root=folder,
            reporter=reporter,
            source=path,
        )
    if path is None:
        raise UsageError(f"an image-folder needs data.{split}: the folder or zip file of the {split} split")
    return load_folder_split(
        path,
        split,
        classes=classes,
        channels=channels,
        image_size=image_size,
        reporter=reporter,
        # Merely looked for: where it is absent, this split alone can still be used.
        other_path=_first_of(source_places(other_source, folder, folders)) if other_source else None,
    )


def find_data(name: str, *, root: Path | None, source: str | None = None) -> Path | None:
    """Return where a data set lies on this machine, without opening it; None where it is absent.

    The digits come with scikit-learn and are found at the folder that is searched.
    """
    folder = Path(os.path.expanduser(root or data_home()))
    if name == "digits":
        return folder
    if name in CIFAR_FOLDERS or name in MNIST_FOLDERS:
        places = [folder / (CIFAR_FOLDERS | MNIST_FOLDERS)[name]]
        if name in CIFAR_FOLDERS:
            # Unpacked on first use.
            places.append(folder / cifar_class(name).filename)
        return _first_of(places)
    if source:
        return _first_of(source_places(source, folder))
    return find_tinyimagenet(folder) if name == "tinyimagenet200" else None


def resolve_source(source: str, root: Path, folders: Sequence[Path] = ()) -> Path:
    """Return the folder or zip file that a recipe names.

    Raises:
        DataError: If it is in none of the places where it may be.
    """
    places = source_places(source, root, folders)
    if (found := _first_of(places)) is not None:
        return found
    raise DataError(
        f"{source} is not there: looked for {' or '.join(map(str, places))}",
        hint=similar_file(places[0]) or "put it there, or set data.root to the folder that holds it",
    )


def source_places(source: str, root: Path, folders: Sequence[Path] = ()) -> list[Path]:
    """Return where a folder or zip file that a recipe names may lie, the first choice first."""
    path = Path(os.path.expanduser(source))
    if path.is_absolute():
        return [path]
    return list(dict.fromkeys(folder / path for folder in (root, Path.cwd(), *folders)))


def _first_of(places: Sequence[Path]) -> Path | None:
    return next((path for path in places if path.exists()), None)


def _check_request(
    name: str, split: str, classes: int, channels: int, image_size: int, source: str | None
) -> None:
    if name not in DATASETS:
        raise UsageError(
            f"{name!r} is no data set; there are {', '.join(DATASETS)}", hint=nearest(name, DATASETS)
        )
    if split not in SPLITS:
        raise UsageError(f"{split!r} is no split; there are train and test", hint=nearest(split, SPLITS))
    if channels not in (1, 3):
        raise UsageError(f"{channels} channels were asked for; 1 and 3 are possible")
    facts = DATASETS[name]
    if facts.classes not in (None, classes):
        raise DataError(
            f"{name} has {facts.classes} classes; {classes} are stated",
            hint=f"set data.classes={facts.classes}",
        )
    if facts.image_size not in (None, image_size):
        raise DataError(
            f"the images of {name} are {facts.image_size}x{facts.image_size};"
            f" {image_size}x{image_size} is stated",
            hint=f"set data.image_size={facts.image_size}",
        )
    if source and not facts.takes_source:
        raise UsageError(
            f"{name} takes no data.{split} ({source!r} was given)",
            hint="leave it out, or set data.name=image-folder",
        )

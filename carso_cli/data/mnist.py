"""MNIST (LeCun and Cortes, 2010) and Fashion-MNIST (Xiao et al., 2017), in torchvision's layout.

Their files lie in `MNIST/raw` and `FashionMNIST/raw`. They are read by torchvision's readers, and not by its
data set classes, which would load pickles of old versions that lie beside them.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError
from carso_cli.io.checksum import file_digest
from carso_cli.io.download import fetch
from carso_cli.io.files import atomic_write, read_limited
from carso_cli.runtime.reporter import Reporter

FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
"""The folder of each data set's files."""
TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
SIZE = 28
# By https; torchvision's own address of Fashion-MNIST is plain http.
_ADDRESSES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
}
_SPLITS = {"train": "train", "test": "t10k"}
_LARGEST = 100_000_000
"""Bytes; the largest of the files has 47 million."""


def load_mnist_split(name: str, split: str, *, channels: int, root: Path, reporter: Reporter) -> ImageSet:
    """Load a split of 28x28 images in the official order, downloading its files on first use.

    Args:
        name: `"mnist"` or `"fashion-mnist"`.
        split: `"train"` (60,000 images) or `"test"` (10,000).
        channels: 1, or 3 equal ones.
        root: Folder that holds, or is to hold, torchvision's `MNIST` or `FashionMNIST`.
        reporter: Where progress goes.

    Raises:
        MissingError: If a file is absent and cannot be downloaded, or (`DataError`) is damaged.
    """
    _, dataset = torchvision_mnist(name)
    images, labels = (_read(name, split, kind, root, reporter) for kind in ("images", "labels"))
    if images.shape[1:] != (SIZE, SIZE) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{root / FOLDERS[name]} holds {split} images of shape {tuple(images.shape)} and labels of shape "
            f"{tuple(labels.shape)}; images of {SIZE}x{SIZE} with one label each are needed"
        )
    pixels = images[:, None].repeat(1, channels, 1, 1)
    return ImageSet(pixels, labels, torch.arange(len(labels)), tuple(dataset.classes))


def torchvision_mnist(name: str) -> tuple[Any, Any]:
    """Return torchvision's module of readers and its class for a data set, imported here and not before."""
    from carso_cli.runtime.third_party import prepare

    prepare()
    from torchvision.datasets import mnist

    return mnist, {"mnist": mnist.MNIST, "fashion-mnist": mnist.FashionMNIST}[name]


def mnist_files(name: str) -> dict[str, tuple[str, str]]:
    """Return address and MD5 checksum of each compressed file, by its name."""
    _, dataset = torchvision_mnist(name)
    return {file: (f"{_ADDRESSES[name]}{file}", md5) for file, md5 in dataset.resources}


def _read(name: str, split: str, kind: str, root: Path, reporter: Reporter) -> Tensor:
    readers, _ = torchvision_mnist(name)
    file = f"{_SPLITS[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    path = root / FOLDERS[name] / file
    if not path.is_file():
        _unpack(name, path, reporter)
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} has {path.stat().st_size} bytes; {_LARGEST} are the most")
        found: Tensor = (readers.read_image_file if kind == "images" else readers.read_label_file)(str(path))
    # What torchvision's reader meets in a file that is not of its format.
    except (OSError, AssertionError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{path} is damaged or no file of {TITLES[name]}: {error}", hint=f"remove {path}"
        ) from None
    return found


def _unpack(name: str, path: Path, reporter: Reporter) -> None:
    packed = path.with_name(f"{path.name}.gz")
    url, md5 = mnist_files(name)[packed.name]
    if not packed.is_file():
        fetch(url, packed, checksum=f"md5:{md5}", name=TITLES[name], reporter=reporter)
    elif (seen := file_digest(packed, "md5")) != md5:
        raise DataError(
            f"{packed} has the MD5 checksum {seen}; {md5} is the published one",
            hint=f"remove it and fetch {url} again",
        )
    try:
        content = gzip.decompress(read_limited(packed, _LARGEST))
        with atomic_write(path) as stream:
            stream.write(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed} cannot be unpacked: {error}") from error

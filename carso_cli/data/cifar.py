"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read by torchvision from the official files.

Those files are pickles, so they are opened only after every one of them has matched its published checksum,
and even then nothing but arrays is taken from them; torchvision's integrity check is never bypassed.
"""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from carso_cli.data import array_pickles
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError
from carso_cli.io.checksum import file_digest
from carso_cli.io.download import fetch
from carso_cli.io.files import atomic_write
from carso_cli.runtime.reporter import Reporter

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""The folder that each data set's official archive unpacks to."""

# ITU-R 601 luma in 16-bit fixed point, as Pillow computes it for image files.
_LUMA = np.array([19595, 38470, 7471], dtype=np.int64)


class _Cifar(Protocol):
    data: NDArray[np.uint8]
    """(M, 32, 32, 3)."""
    targets: list[int]
    classes: list[str]


class _CifarClass(Protocol):
    url: str
    filename: str
    tgz_md5: str
    base_folder: str
    train_list: list[tuple[str, str]]
    """File names and MD5 checksums."""
    test_list: list[tuple[str, str]]
    meta: dict[str, str]

    def __call__(self, root: str, train: bool, download: bool) -> _Cifar: ...


def load_cifar_split(name: str, split: str, *, channels: int, root: Path, reporter: Reporter) -> ImageSet:
    """Load a split of 32x32 images in the official order, downloading the data set on first use.

    Args:
        name: `"cifar10"` or `"cifar100"`.
        split: `"train"` (50,000 images) or `"test"` (10,000).
        channels: 3, or 1 for grey.
        root: Folder that holds, or is to hold, the official archive or the folder it unpacks to.
        reporter: Where progress goes.

    Raises:
        MissingError: If the data set is absent and cannot be downloaded, or (`DataError`) is damaged.
    """
    dataset_class = cifar_class(name)
    dataset = _open(dataset_class, root, split)
    if dataset is None:
        _obtain(dataset_class, name, root, reporter)
        dataset = _open(dataset_class, root, split)
    if dataset is None:
        folder = root / dataset_class.base_folder
        raise DataError(f"{folder} does not match the published checksums", hint=f"remove {folder}")
    pixels = np.asarray(dataset.data)
    if channels == 1:
        pixels = ((pixels @ _LUMA + 2**15) >> 16).astype(np.uint8)[..., None]
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    labels = torch.tensor(dataset.targets, dtype=torch.int64)
    return ImageSet(images, labels, torch.arange(len(labels)), tuple(dataset.classes))


def cifar_class(name: str) -> _CifarClass:
    """Return torchvision's class for a data set; torchvision is imported here and not before."""
    from carso_cli.runtime.third_party import prepare

    prepare()
    from torchvision import datasets

    # In that module alone, which would run whatever a pickle says.
    datasets.cifar.pickle = array_pickles
    found: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    checked: _CifarClass = found
    return checked


def _open(dataset_class: _CifarClass, root: Path, split: str) -> _Cifar | None:
    """Return the data set, or None where its files are missing or fail their checksums."""
    try:
        return dataset_class(root=str(root), train=split == "train", download=False)
    except RuntimeError:
        return None


def _obtain(dataset_class: _CifarClass, name: str, root: Path, reporter: Reporter) -> None:
    archive = root / dataset_class.filename
    if not archive.is_file():
        checksum = f"md5:{dataset_class.tgz_md5}"
        fetch(dataset_class.url, archive, checksum=checksum, name=name, reporter=reporter)
    elif (seen := file_digest(archive, "md5")) != dataset_class.tgz_md5:
        raise DataError(
            f"{archive} has the MD5 checksum {seen}; {dataset_class.tgz_md5} is the published one",
            hint=f"remove it and fetch {dataset_class.url} again",
        )
    reporter.info(f"unpacking {archive}")
    try:
        _unpack(archive, root / dataset_class.base_folder)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error


def _unpack(archive: Path, folder: Path) -> None:
    """Write the archive's files, which lie in one folder, into `folder`, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            with atomic_write(folder / PurePosixPath(member.name).name) as stream:
                stream.write(content.read())

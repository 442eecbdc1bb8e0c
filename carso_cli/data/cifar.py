"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read by torchvision from the official files.

Those files are pickles, so each is opened only after it has matched its published checksum, and even then
only arrays in plain containers are taken from it: a pickle that asks for anything else, a function to call
or a class to build, is refused.
"""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch

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

# Private in numpy, and moved by release 2; every array's own `__reduce__` still leads to it.
_RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]  # untyped in numpy
_ALLOWED: dict[tuple[str, str], Any] = {
    # A pickle names the module as it was called in the numpy that wrote it.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


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
        # A damaged folder is unpacked once more from its archive, before it is given up.
        _obtain(dataset_class, name, root, reporter)
        dataset = _open(dataset_class, root, split)
    if dataset is None:
        folder = root / dataset_class.base_folder
        raise DataError(f"{folder} does not match the published checksums", hint=f"remove {folder}")
    pixels = np.asarray(dataset.data)
    if channels == 1:
        # int64, since uint8 products would wrap around; half of 2**16 rounds to nearest instead of down.
        pixels = ((pixels @ _LUMA + 2**15) >> 16).astype(np.uint8)[..., None]
    # torchvision stores CIFAR as (M, H, W, channels).
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    labels = torch.tensor(dataset.targets, dtype=torch.int64)
    return ImageSet(images, labels, torch.arange(len(labels)), tuple(dataset.classes))


def cifar_class(name: str) -> Any:  # noqa: ANN401  (torchvision is untyped)
    """Return torchvision's class for a data set; torchvision is imported here and not before."""
    from carso_cli.runtime.third_party import prepare

    prepare()
    from torchvision import datasets

    # In that module alone: Python's own `load` would run whatever a pickle asks for.
    datasets.cifar.pickle = SimpleNamespace(load=load_arrays)
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def load_arrays(stream: BinaryIO, *, encoding: str = "ASCII") -> Any:  # noqa: ANN401  (as `pickle.load`)
    """Read a pickle of arrays in plain containers, without running any code in it.

    Args:
        stream: The file.
        encoding: How 8-bit texts of Python 2 are decoded.

    Raises:
        pickle.UnpicklingError: If it asks for anything but arrays.
    """
    return _ArraysOnly(stream, encoding=encoding).load()


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  (what pickle asks for)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a plain container")
        return _ALLOWED[module, name]


def _open(dataset_class: Any, root: Path, split: str) -> Any:  # noqa: ANN401  (torchvision is untyped)
    """Return the data set, or None where its files are missing or fail their checksums."""
    try:
        # torchvision checks the checksum of every file before it opens one.
        return dataset_class(root=str(root), train=split == "train", download=False)
    # So torchvision says of a missing file and of a wrong checksum alike.
    except RuntimeError:
        return None


def _obtain(dataset_class: Any, name: str, root: Path, reporter: Reporter) -> None:  # noqa: ANN401  (as above)
    archive = root / dataset_class.filename
    if not archive.is_file():
        checksum = f"md5:{dataset_class.tgz_md5}"
        fetch(dataset_class.url, archive, checksum=checksum, name=name, reporter=reporter)
    # An archive put there by hand; `fetch` has checked its own.
    elif (seen := file_digest(archive, "md5")) != dataset_class.tgz_md5:
        raise DataError(
            f"{archive} has the MD5 checksum {seen}; {dataset_class.tgz_md5} is the published one",
            hint=f"remove it and fetch {dataset_class.url} again",
        )
    reporter.info(f"unpacking {archive}")
    folder = root / dataset_class.base_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as members:
            for member in members:
                if member.isfile() and (content := members.extractfile(member)) is not None:
                    # All files lie in one folder: only their last name counts, wherever a member points to.
                    with atomic_write(folder / PurePosixPath(member.name).name) as stream:
                        stream.write(content.read())
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error

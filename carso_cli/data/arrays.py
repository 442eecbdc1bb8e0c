"""Images and labels in one file: `.npz`, `.pt` (or `.pth`), `.safetensors`.

    found = read_arrays(Path("images.npz"), reporter=reporter)
    found.images, found.labels

Nothing in a file is run: `.npz` is read without pickles, `.pt` with `weights_only=True`. What could be meant
in two ways (which array holds the images, channels first or last) is decided by shapes and names, and said.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from carso_cli.errors import DataError
from carso_cli.io.files import similar_file
from carso_cli.runtime.reporter import Reporter

SUFFIXES = (".npz", ".pt", ".pth", ".safetensors")
"""File endings, in lower case, that count as files of arrays."""

MAX_BYTES = 2**36
"""Largest uncompressed size of a file (64 GiB): a few kilobytes may unpack to any number of zeros."""

_NAMES = (
    # (images, labels), the first pair that a file holds
    *(("test_images", "test_labels"), ("x_test", "y_test"), ("images", "labels"), ("images", "targets")),
    *(("x", "y"), ("data", "labels"), ("data", "targets"), ("inputs", "labels"), ("inputs", "targets")),
    *(("image", "label"), ("imgs", "labels"), ("perturbed", "labels"), ("adversarial", "labels")),
    *(("x_adv", "y"), ("0", "1"), ("arr_0", "arr_1")),
)
_IMAGE_NAMES = (
    "perturbed",
    "adversarial",
    "x_adv",
    "adv_complete",
    *dict.fromkeys(name for name, _ in _NAMES),
)
_WEB_PAGE = (b"<!doc", b"<html")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images of a file.

    Args:
        images: (M, channels, H, W), uint8, or float32 in [0, 1].
        labels: (M,) int64 from 0; None where the file holds none.
    """

    images: Tensor
    labels: Tensor | None


def read_arrays(path: Path, *, reporter: Reporter, needs_labels: bool = True) -> Arrays:
    """Read images and labels.

    Args:
        path: The file. It holds two arrays, named in one of the usual ways (`images` and `labels`, `x` and
            `y`, …) or told apart by their shapes; images are uint8, or floating-point in [0, 1].
        reporter: Told what was decided where a file leaves it open.
        needs_labels: Whether a file without labels is refused.

    Raises:
        DataError: If the file is missing, damaged, or could only be read by running code in it; if it holds
            no images, or none with labels; if shapes, kinds or ranges of values are others than those above.
    """
    _check_file(path)
    arrays = _as_tensors(_read(path), path)
    image_name, label_name = _choose(arrays, path, needs_labels)
    images = _as_images(arrays[image_name], image_name, path, reporter)
    labels = None if label_name is None else _as_labels(arrays[label_name], label_name, len(images), path)
    return Arrays(images, labels)


def _check_file(path: Path) -> None:
    """Check what a file is by its first bytes, so that the message names it.

    Raises:
        DataError: If it is missing, empty, a folder, a web page or a Git LFS pointer.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint=similar_file(path)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise DataError(f"{path} is empty (0 bytes)", hint="save or fetch it again")
    if start.lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(f"{path} is a web page, not a file of arrays", hint="fetch the file itself")
    if start.startswith(_LFS):
        raise DataError(f"{path} is a Git LFS pointer, not the file itself", hint="run `git lfs pull` there")


def _read(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    readers: dict[str, Callable[[Path], Any]] = {
        ".npz": _read_npz,
        ".pt": _read_pt,
        ".pth": _read_pt,
        ".safetensors": load_file,
    }
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path} is none of {', '.join(SUFFIXES)}",
            hint="numpy.savez(FILE, images=images, labels=labels) writes a file that can be read",
        )
    try:
        return readers[path.suffix.lower()](path)
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors; reading it could run code, and is refused",
            hint="save tensors alone: torch.save({'images': images, 'labels': labels}, FILE)",
        ) from error
    # A damaged file surfaces as almost any kind of error.
    except (SafetensorError, Exception) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} is not a readable {path.suffix} file: {reason}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path} is no .npz file: it is not a zip archive",
            hint="numpy.savez(FILE, images=images, labels=labels) writes one",
        ) from error
    if size > MAX_BYTES:
        raise DataError(f"{path} would unpack to {size:,} bytes; at most {MAX_BYTES:,} are allowed")
    with np.load(path, allow_pickle=False) as stored:
        try:
            return {name: stored[name] for name in stored.files}
        except ValueError as error:
            if "pickle" not in str(error).lower():
                raise
            raise DataError(
                f"{path} holds Python objects (an array of dtype object); reading them could run code, "
                "and is refused",
                hint="save plain arrays of one shape, such as numpy.stack(images)",
            ) from error


def _read_pt(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise DataError(f"{path} holds compressed parts, which PyTorch does not write")
    with warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _as_tensors(content: Any, path: Path) -> dict[str, Tensor]:  # noqa: ANN401  (whatever the file holds)
    if isinstance(content, Tensor):
        content = [content]
    if isinstance(content, list | tuple):
        content = {str(place): value for place, value in enumerate(content)}
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}, not images and labels")
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            # Texts and dates have no tensor; big-endian numbers have to be turned round.
            if value.dtype.kind in "biuf":
                found[str(name)] = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        elif isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
            found[str(name)] = torch.tensor(value)
    return found


def _choose(arrays: Mapping[str, Tensor], path: Path, needs_labels: bool) -> tuple[str, str | None]:
    """Return the names of the images and of the labels; None where there are none and none are needed."""
    lower = {name.lower(): name for name in arrays}
    for images, labels in _NAMES:
        if images in lower and labels in lower:
            return lower[images], lower[labels]
    pictures = [name for name, value in arrays.items() if value.ndim in (3, 4)]
    numbers = [name for name, value in arrays.items() if value.ndim == 1 or _is_column(value)]
    if len(pictures) > 1:
        pictures = [lower[name] for name in _IMAGE_NAMES if name in lower and lower[name] in pictures][:1]
    if len(pictures) == 1 and len(numbers) == 1:
        return pictures[0], numbers[0]
    if len(pictures) == 1 and not needs_labels:
        return pictures[0], None
    shown = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list(arrays.items())[:6])
    raise DataError(
        f"{path} holds no images with labels that could be told apart; it holds {shown or 'no arrays'}",
        hint="name them images, (M, channels, height, width), and labels, (M,)",
    )


def _is_column(values: Tensor) -> bool:
    return values.ndim == 2 and values.shape[1] == 1


def _as_images(values: Tensor, name: str, path: Path, reporter: Reporter) -> Tensor:
    """Return (M, channels, H, W) images, uint8 or float32 in [0, 1]."""
    images = _channels_first(values, name, path, reporter)
    if not images.numel():
        raise DataError(f"{path}: '{name}' has shape {tuple(values.shape)}: no image")
    if images.dtype == torch.uint8:
        if int(images.max()) <= 1:
            raise DataError(
                f"{path}: '{name}' holds uint8 pixels of at most {int(images.max())}; uint8 goes up to 255",
                hint="save pixels from 0 to 1 as floating-point numbers, or multiply them by 255",
            )
        return images.contiguous()
    if not images.is_floating_point():
        raise DataError(
            f"{path}: '{name}' holds {_kind(images)} numbers; uint8, or floating-point in [0, 1], is needed",
            hint="convert pixels from 0 to 255 with .astype('uint8') (numpy) or .to(torch.uint8)",
        )
    _check_range(images, name, path)
    return images.to(torch.float32).clamp(0.0, 1.0).contiguous()


def _check_range(images: Tensor, name: str, path: Path) -> None:
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{path}: '{name}' holds pixels that are NaN or infinite")
    # A resize or a conversion may overshoot by a rounding.
    if low >= -1e-6 and high <= 1.0 + 1e-6:
        return
    remedy = (
        "divide them by 255, or save them as uint8"
        if low >= 0.0 and high <= 255.0
        else "undo the standardisation: the model that is audited must contain it, and take pixels in [0, 1]"
    )
    raise DataError(
        f"{path}: '{name}' holds {_kind(images)} pixels from {low:.4g} to {high:.4g}; [0, 1] is needed",
        hint=remedy,
    )


def _channels_first(values: Tensor, name: str, path: Path, reporter: Reporter) -> Tensor:
    shape = tuple(values.shape)
    if values.ndim == 3:
        return values[:, None]
    if values.ndim == 4 and shape[1] in (1, 3):
        if shape[3] in (1, 3):
            reporter.warning(f"{path}: '{name}' has shape {shape}: read as channels first (NCHW)")
        return values
    if values.ndim == 4 and shape[3] in (1, 3):
        reporter.info(f"{path}: '{name}' has shape {shape}: read as channels last (NHWC)")
        return values.permute(0, 3, 1, 2)
    raise DataError(
        f"{path}: '{name}' has shape {shape}; (M, channels, height, width) with 1 or 3 channels is needed",
        hint="(M, height, width, channels) and, for grey images, (M, height, width) are read too",
    )


def _as_labels(values: Tensor, name: str, count: int, path: Path) -> Tensor:
    """Return (M,) int64 labels from 0."""
    labels = values[:, 0] if _is_column(values) else values
    if labels.shape != (count,):
        one_hot = labels.ndim == 2 and len(labels) == count
        raise DataError(
            f"{path}: '{name}' has shape {tuple(values.shape)} for {count} images; ({count},) is needed",
            hint="save the classes' numbers: labels.argmax(1)" if one_hot else "a label for each image",
        )
    whole = labels.to(torch.int64)
    if labels.dtype == torch.bool or not bool((whole == labels).all()):
        raise DataError(f"{path}: '{name}' holds {_kind(labels)} values; whole numbers from 0 are needed")
    if int(whole.min()) < 0:
        raise DataError(f"{path}: '{name}' goes down to {int(whole.min())}; labels count from 0")
    return whole


def _kind(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")

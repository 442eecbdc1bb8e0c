"""Decoded images, kept on disk so that the second start of a run takes seconds.

One npz file for each split of a source, under `cache` in CARSO_HOME. It holds the key it was made for and a
checksum of its pixels: if the source has changed, the file is replaced; if it is damaged, it is written again
with a warning; if it cannot be written, the images are decoded at each start.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from carso_cli.data.decode import decode_image
from carso_cli.data.file_tree import FileTree
from carso_cli.io.files import atomic_write
from carso_cli.io.paths import home
from carso_cli.runtime.reporter import Reporter

FORMAT_VERSION = 1
"""Raise this when decoding or the layout of the file changes: files of other versions are replaced."""

FEWEST_KEPT = 1000
"""Fewer images than this are decoded at each start, in a fraction of a second."""

_REPORT_EVERY = 250


def load_images(
    tree: FileTree, names: Sequence[str], *, slot: str, channels: int, image_size: int, reporter: Reporter
) -> Tensor:
    """Return the named images of a tree, from the cache where it holds them.

    Args:
        tree: Where the images lie.
        names: Their names in `tree`, in the order wanted.
        slot: Which part of the tree this is, e.g. `"test"`; one file is kept for each slot.
        channels: 1 or 3.
        image_size: Height and width of every image, in pixels.
        reporter: Where progress and warnings go.

    Returns:
        uint8 (M, channels, image_size, image_size).

    Raises:
        DataError: If an image is damaged or of another size; it is named.
    """
    if len(names) < FEWEST_KEPT:
        return torch.from_numpy(_decode(tree, names, channels, image_size, reporter))
    shape = (len(names), channels, image_size, image_size)
    # Another release of Pillow may decode a JPEG to slightly other pixels.
    key = _checksum(f"{FORMAT_VERSION} {PIL.__version__} {shape} {tree.fingerprint(names)}".encode())
    # The name of the file leaves the key out, so that a changed source replaces it instead of adding another.
    # `fsencode`: a path may hold bytes that are no UTF-8, at which `encode` would fail.
    place = _checksum(os.fsencode(f"{tree.path.resolve()}\n{slot}\n{shape[1:]}"))[:16]
    file = home() / "cache" / f"images-{place}.npz"
    images = _read(file, key, shape, reporter)
    if images is None:
        images = _decode(tree, names, channels, image_size, reporter)
        _write(file, key, images, reporter)
    return torch.from_numpy(images)


def _decode(
    tree: FileTree, names: Sequence[str], channels: int, image_size: int, reporter: Reporter
) -> NDArray[np.uint8]:
    images = np.empty((len(names), channels, image_size, image_size), dtype=np.uint8)
    first_hint = "set data.image_size to the size of the images, or resize them to it"
    later_hint = f"images decoded before it are {image_size}x{image_size}; mixed sizes are refused: resize it"
    with reporter.progress(f"decoding {tree.path.name}", total=len(names)) as progress:
        for start in range(0, len(names), _REPORT_EVERY):
            chunk = names[start : start + _REPORT_EVERY]
            for position, name in enumerate(chunk, start):
                images[position] = decode_image(
                    tree.read(name),
                    name=tree.where(name),
                    channels=channels,
                    image_size=image_size,
                    # `image_size` fits the images before: another one would only move the fault.
                    size_hint=later_hint if position else first_hint,
                )
            progress.advance(len(chunk))
    return images


def _read(file: Path, key: str, shape: tuple[int, ...], reporter: Reporter) -> NDArray[np.uint8] | None:
    """Return the kept images, or None where there are none for this key."""
    if not file.is_file():
        return None
    try:
        # A pickled array in the file could run code.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                # The source has changed: no damage, so no warning.
                return None
            images: NDArray[np.uint8] = kept["images"]
            intact = images.shape == shape and images.dtype == np.uint8
            # The key says what the file was made for, not that its pixels are still those.
            intact = intact and str(kept["checksum"]) == _checksum(images.data)
    except Exception:  # whatever is wrong with the file, the images can be decoded again
        intact = False
    if not intact:
        reporter.warning(f"{file} is damaged: decoding the images again")
        return None
    return images


def _write(file: Path, key: str, images: NDArray[np.uint8], reporter: Reporter) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another run may read or write the same file meanwhile.
        with atomic_write(file) as stream:
            np.savez(stream, key=np.array(key), checksum=np.array(_checksum(images.data)), images=images)
    # A full disk or a read-only home costs time at the next start, never the run.
    except OSError as error:
        reporter.warning(
            f"decoded images cannot be kept in {file.parent}, the next start decodes again: {error}"
        )


def _checksum(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=20).hexdigest()

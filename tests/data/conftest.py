"""Small image folders and zip files to load."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteImage = Callable[..., Path]


@pytest.fixture
def write_image() -> WriteImage:
    """Write an image of one value (or of the pixels given), its folders made."""

    def write(path: Path, value: int = 0, *, size: int = 32, pixels: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.full((size, size, 3), value, dtype=np.uint8) if pixels is None else pixels
        Image.fromarray(array).save(path)
        return path

    return write


@pytest.fixture
def two_splits(tmp_path: Path, write_image: WriteImage) -> Path:
    """train/ and test/ with the classes bird (2 each) and cat (3 each); pixel value = 10 * label + number."""
    root = tmp_path / "two-splits"
    for split in ("train", "test"):
        for label, (name, count) in enumerate((("bird", 2), ("cat", 3))):
            for number in range(count):
                write_image(root / split / name / f"{number}.png", 10 * label + number)
    return root


@pytest.fixture
def zip_up() -> Callable[..., Path]:
    """Zip a folder's files, optionally under a leading folder."""

    def pack(folder: Path, target: Path, lead: str = "") -> Path:
        with zipfile.ZipFile(target, "w") as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    archive.write(file, lead + file.relative_to(folder).as_posix())
        return target

    return pack

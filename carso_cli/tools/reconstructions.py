"""Writes reconstructions as image files: one PNG per sample, their mean, and a grid of the first images."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from carso_cli.io.json_files import ensure_folder
from carso_cli.pictures.grids import save_grid, save_image

_IN_GRID = 10
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_NAME = 60


class ReconstructionWriter:
    """Writes the reconstructions of one image after another into a folder.

    Args:
        folder: Created, and proven writable, at once.

    Raises:
        CarsoError: If the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = ensure_folder(folder)
        self._count = 0
        self._shown: list[tuple[Tensor, Tensor]] = []

    def write(self, source: Path, image: Tensor, samples: Tensor) -> list[str]:
        """Write one image's reconstructions.

        Args:
            source: Where the image came from; its name, made harmless, is part of the new ones.
            image: (channels, H, W) in [0, 1].
            samples: (N, channels, H, W) in [0, 1].

        Returns:
            The files: `0001-NAME-sample-1.png`, … and `0001-NAME-mean.png`.
        """
        self._count += 1
        if len(self._shown) < _IN_GRID:
            self._shown.append((image, samples))
        # The number keeps files of one name from different folders apart.
        name = f"{self._count:04d}-{_NOT_IN_NAMES.sub('_', source.stem)[:_LONGEST_NAME]}"
        pictures = {f"sample-{number}": sample for number, sample in enumerate(samples, start=1)}
        pictures["mean"] = samples.mean(dim=0)
        written = []
        for part, pixels in pictures.items():
            path = self.folder / f"{name}-{part}.png"
            save_image(path, pixels)
            written.append(str(path))
        return written

    def write_grid(self) -> str | None:
        """Write `grid.png`: inputs, samples and mean of the first images; None if nothing was written."""
        if not self._shown:
            return None
        images = torch.stack([image for image, _ in self._shown])
        samples = torch.stack([chosen for _, chosen in self._shown])
        rows = [("input", images)]
        rows += [(f"sample {number + 1}", samples[:, number]) for number in range(samples.shape[1])]
        rows.append(("mean", samples.mean(dim=1)))
        path = self.folder / "grid.png"
        save_grid(path, rows)
        return str(path)

"""Classify image files with a trained defence.

    result = predict(["cat.png", "folder"], run=Path("runs/digits"), reporter=reporter)
    for row in result["images"]:
        row["path"], row["class"], row["probability"], row["agreement"]

The latents of an image are a function of the seed and of its pixels, so the same image gets the same
answer alone or among others, in any order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carso_cli.build import load_defence
from carso_cli.data.decode import SUFFIXES
from carso_cli.data.image_files import read_images
from carso_cli.defence.answer import classify
from carso_cli.errors import DataError
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.description import class_names
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.tools.reconstructions import ReconstructionWriter

_READ_TOGETHER = 256


def predict(
    named: Sequence[Path | str],
    *,
    run: Path,
    reporter: Reporter,
    n_samples: int | None = None,
    aggregation: str | None = None,
    seed: int | None = None,
    device: str = "auto",
    resize: bool = False,
    save: Path | None = None,
) -> dict[str, Any]:
    """Classify image files with the defence of a trained run.

    Args:
        named: Image files, and folders whose image files are all taken.
        run: Run folder of `carso train-purifier`.
        reporter: Where progress goes.
        n_samples: N, reconstructions per image; the recipe's when None.
        aggregation: Aggregation rule; the recipe's when None.
        seed: Seed of the latents; the recipe's when None.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        resize: Crop and resize images of another size instead of refusing them.
        save: Folder that receives every reconstruction as PNG, and a grid of the first images.

    Returns:
        `run`, `recipe`, `n_samples`, `aggregation`, `seed`, `images` and `grid` (a path, or None). Each image
        has `path`, what `Answer.describe` says of it, and `saved`, the files written.

    Raises:
        UsageError: If nothing is named.
        DataError: If a file is missing, damaged, or does not fit; if a folder holds no image.
        StateError: If the run is absent, unfinished or damaged.
    """
    defence = load_defence(run, device=device, n_samples=n_samples, aggregation=aggregation)
    recipe = load_recipe(str(RunFolder(run).recipe.resolve()))
    paths = find_images(named)
    pixels = _read(paths, recipe, resize)
    names = class_names(RunFolder(run), recipe)
    chosen = recipe.seed if seed is None else seed
    writer = None if save is None else ReconstructionWriter(save)
    rows: list[dict[str, Any]] = []
    with reporter.progress("classifying", len(paths)) as progress:
        for part in _passes(len(paths), defence.n_samples, recipe):
            images = pixels[part].to(torch.float32).div_(255.0)
            answer = classify(defence, images, chosen)
            for place, path in enumerate(paths[part]):
                saved = writer.write(path, images[place], answer.reconstructions[place]) if writer else []
                rows.append({"path": _readable(path), **answer.describe(place, names), "saved": saved})
            progress.advance(len(images))
    return {
        "run": str(run),
        "recipe": recipe.name,
        "n_samples": defence.n_samples,
        "aggregation": defence.aggregation,
        "seed": chosen,
        "images": rows,
        "grid": None if writer is None else writer.write_grid(),
    }


def _passes(count: int, n_samples: int, recipe: Recipe) -> list[slice]:
    evaluation = recipe.evaluation
    size = max(min(evaluation.samples_per_pass // n_samples, evaluation.batch_size), 1)
    return [slice(start, start + size) for start in range(0, count, size)]


def _readable(path: Path) -> str:
    # A name need not be valid text; what is shown and written as JSON must be.
    return os.fsencode(path).decode("utf-8", errors="replace")


def find_images(named: Iterable[Path | str]) -> list[Path]:
    """Return image files in the order named, folders replaced by the image files under them, sorted.

    Files that are named are taken whatever they are called; in folders, hidden files and folders are passed
    over, and links to folders are not followed.

    Raises:
        DataError: If a folder holds no image file, or cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, named):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(_images_under(path))
        if not inside:
            raise DataError(
                f"{path} holds no image file ({', '.join(sorted(SUFFIXES))})",
                hint="name a folder that holds some, or the files themselves",
            )
        found += inside
    return found


def _images_under(folder: Path) -> Iterable[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(parent) / name


def _read(paths: Sequence[Path], recipe: Recipe, resize: bool) -> Tensor:
    """Return uint8 (B, channels, H, W), a quarter of the memory of the floats that are read."""
    data = recipe.data
    parts = [
        read_images(
            paths[start : start + _READ_TOGETHER],
            channels=data.channels,
            image_size=data.image_size,
            resize=resize,
        )
        .mul(255.0)
        .round()
        .to(torch.uint8)
        # One pass even where nothing is named, so that the reader says so.
        for start in range(0, max(len(paths), 1), _READ_TOGETHER)
    ]
    return torch.cat(parts)

"""Classify image files with a trained defence.

    result = predict(["cat.png", "folder"], run=Path("runs/digits"), reporter=reporter)
    for row in result["images"]:
        row["path"], row["class"], row["probability"], row["agreement"]

The latents of an image are a function of the seed and of its pixels, so the same image gets the same
answer alone or among others, in any order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carso_cli.build import load_defence
from carso_cli.data.decode import SUFFIXES, looks_like_image, read_images, read_start
from carso_cli.data.image_set import ordered_batches
from carso_cli.defence.answer import classify
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import DataError
from carso_cli.io.json_files import ensure_folder
from carso_cli.pictures.grids import Row, save_grid, save_image
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.description import class_names
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.tools.target import given_classifier

# Images decoded at once, which bounds the memory of their float32 pixels.
_READ_TOGETHER = 256
_IN_GRID = 10
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
# With number and part a name stays far below 255 bytes, the limit of most file systems.
_LONGEST_NAME = 60


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
    classifier: str | None = None,
) -> dict[str, Any]:
    """Classify image files with the defence of a trained run.

    Args:
        named: Image files, and folders whose image files are all taken.
        run: Run folder of `carso train-purifier`.
        reporter: Where progress goes.
        n_samples: N, reconstructions per image; like `aggregation` and `seed`, the recipe's when None.
        aggregation: Aggregation rule.
        seed: Seed of the latents.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        resize: Crop and resize images of another size instead of refusing them.
        classifier: What names the run's classifier, where its recipe names none; see `load_target`.
        save: Folder that receives every reconstruction as PNG, and a grid of the first images.

    Returns:
        `run`, `recipe`, `n_samples`, `aggregation`, `seed`, `images` and `grid` (a path, or None). Each image
        has `path`, what `Answer.describe` says of it, and `saved`, the files written.

    Raises:
        UsageError: If nothing is named.
        DataError: If a file is missing, damaged, or does not fit; if a folder holds no image.
        StateError: If the run is absent, unfinished or damaged.
    """
    given = given_classifier(classifier, reporter=reporter)
    defence = load_defence(run, device=device, n_samples=n_samples, aggregation=aggregation, classifier=given)
    recipe = load_recipe(str(RunFolder(run).recipe.resolve()))
    paths = find_images(named, reporter)
    pixels = _read(paths, recipe, resize)
    chosen = recipe.seed if seed is None else seed
    if save is not None:
        ensure_folder(save)  # before any work, so that an unwritable folder costs none
    rows, shown = list[dict[str, Any]](), list[tuple[Tensor, Tensor]]()
    # A generator: N reconstructions of every image at once might not fit into memory.
    answers = _answers(defence, pixels, recipe, chosen, class_names(RunFolder(run), recipe), reporter)
    for path, (image, samples, described) in zip(paths, answers, strict=True):
        saved = _save_reconstructions(save, len(rows) + 1, path, samples) if save else []
        shown += [(image, samples)] if len(shown) < _IN_GRID else []
        # A file's name need not be valid text; what is shown and written as JSON must be.
        printable = os.fsencode(path).decode("utf-8", errors="replace")
        rows.append({"path": printable, **described, "saved": saved})
    return {
        "run": str(run),
        "recipe": recipe.name,
        "n_samples": defence.n_samples,
        "aggregation": defence.aggregation,
        "seed": chosen,
        "images": rows,
        "grid": None if save is None else _save_grid(save, shown, [row["class"] for row in rows]),
    }


def _answers(
    defence: Defence, pixels: Tensor, recipe: Recipe, seed: int, names: Sequence[str], reporter: Reporter
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Yield for each image its pixels in [0, 1], its reconstructions, and what the defence says of it."""
    # `samples_per_pass` counts reconstructions, N for each image.
    per_pass = min(recipe.evaluation.samples_per_pass // defence.n_samples, recipe.evaluation.batch_size)
    with reporter.progress("classifying", len(pixels)) as progress:
        for part in ordered_batches(len(pixels), max(per_pass, 1)):
            images = pixels[part].to(torch.float32).div_(255.0)
            answer = classify(defence, images, seed)
            for place, image in enumerate(images):
                yield image, answer.reconstructions[place], answer.describe(place, names)
            progress.advance(len(images))


def _save_reconstructions(folder: Path, number: int, source: Path, samples: Tensor) -> list[str]:
    """Write one image's reconstructions, (N, channels, H, W) in [0, 1], and their mean.

    Returns:
        The files: `0001-NAME-sample-1.png`, … and `0001-NAME-mean.png`.
    """
    # The number keeps apart files of one name from different folders.
    name = f"{number:04d}-{_NOT_IN_NAMES.sub('_', source.stem)[:_LONGEST_NAME]}"
    pictures = {f"sample-{number}": sample for number, sample in enumerate(samples, start=1)}
    pictures["mean"] = samples.mean(dim=0)
    for part, pixels in pictures.items():
        save_image(folder / f"{name}-{part}.png", pixels)
    return [str(folder / f"{name}-{part}.png") for part in pictures]


def _save_grid(folder: Path, shown: Sequence[tuple[Tensor, Tensor]], classes: Sequence[str]) -> str:
    """Write `grid.png`, `.svg` and `.pdf`: input with decision, samples and mean of the first images."""
    images, samples = (torch.stack(tensors) for tensors in zip(*shown, strict=True))
    # Nobody knows the labels of these images, so no decision is marked as right or wrong.
    rows = [Row("input,\ndecision", images, classes[: len(images)])]
    rows += [Row(f"sample {number + 1}", samples[:, number]) for number in range(samples.shape[1])]
    rows.append(Row("mean", samples.mean(dim=1)))
    save_grid(folder / "grid.png", rows)
    return str(folder / "grid.png")


def find_images(named: Iterable[Path | str], reporter: Reporter = SILENT) -> list[Path]:
    """Return image files in the order named, folders replaced by the image files under them, sorted.

    Files that are named are taken whatever they are called; in folders, hidden files and folders are passed
    over, links to folders are not followed, and a warning says how many other files are left out.

    Raises:
        DataError: If a folder holds no image file, or cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, named):
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(_files_under(path))
        inside = [file for file in files if _is_image(file)]
        if inside and (left_out := len(files) - len(inside)):
            reporter.warning(
                f"{path}: {left_out} of {len(files)} files are left out: they are no images that can be read"
            )
        if not inside:
            raise DataError(
                f"{path} holds no image file ({', '.join(sorted(SUFFIXES))})",
                hint="name a folder that holds some, or the files themselves",
            )
        found += inside
    return found


def _is_image(path: Path) -> bool:
    ending = path.suffix.lower()
    return ending in SUFFIXES or (not ending and looks_like_image(read_start(path)))


def _files_under(folder: Path) -> Iterable[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    # Without `onerror`, folders that cannot be read would be passed over in silence.
    for parent, folders, files in os.walk(folder, onerror=refuse):
        # In place, which is how `os.walk` learns what not to enter.
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in files if not name.startswith("."))


def _read(paths: Sequence[Path], recipe: Recipe, resize: bool) -> Tensor:
    """Return uint8 (B, channels, H, W), a quarter of the memory of the floats that are read."""
    size, channels, parts = recipe.data.image_size, recipe.data.channels, []
    # One pass even where nothing is named, so that `read_images` raises its error.
    for start in range(0, max(len(paths), 1), _READ_TOGETHER):
        together = paths[start : start + _READ_TOGETHER]
        images = read_images(together, channels=channels, image_size=size, resize=resize)
        # Exact: each value is a whole number of 255ths, and latents are drawn from these bytes.
        parts.append(images.mul(255.0).round().to(torch.uint8))
    return torch.cat(parts)

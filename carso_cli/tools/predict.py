"""Classify image files with a trained defence.

    result = predict(["cat.png", "folder"], run=Path("runs/digits"), reporter=reporter)
    for row in result["images"]:
        row["path"], row["class"], row["probability"], row["agreement"]

The latents of an image are a function of the seed and of its pixels, so the same image gets the same
answer alone or among others, in any order.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carso_cli.build import load_defence
from carso_cli.data.decode import SUFFIXES
from carso_cli.data.image_files import read_images
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import DataError, StateError
from carso_cli.io.json_files import read_json
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.precision import in_precision
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import generator
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


def class_names(folder: RunFolder, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the classes without opening the data: stored ones, or else their numbers."""
    numbers = tuple(str(label) for label in range(recipe.data.classes))
    try:
        stored = read_json(folder.environment).get("classes")
    except StateError:
        return numbers
    if not isinstance(stored, list) or len(stored) != len(numbers):
        return numbers
    return tuple(str(name) for name in stored)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a defence says about a batch.

    Args:
        decision: (B,) int64.
        probability: (B, C) P of the aggregation.
        sample_probability: (B, N, C) softmax of each reconstruction.
        classifier_probability: (B, C) softmax of the bare classifier on the images themselves.
        reconstructions: (B, N, channels, H, W) in [0, 1].
    """

    decision: Tensor
    probability: Tensor
    sample_probability: Tensor
    classifier_probability: Tensor
    reconstructions: Tensor

    def describe(self, place: int, names: Sequence[str]) -> dict[str, Any]:
        """Describe the answer on one image.

        Args:
            place: Position in the batch.
            names: Class names, in label order.

        Returns:
            `class` and `label`, the decision by name and by number; `probability`, P of the decision under
            the aggregation; `mean_probability`, its softmax averaged over the samples; `votes`, the number of
            samples for each class that has any; `agreement`, the share of samples for the decision;
            `samples`, class and softmax of each; `classifier`, what the bare classifier says. Probabilities
            and shares are in [0, 1].
        """
        label = int(self.decision[place])
        confidence, choices = self.sample_probability[place].max(dim=1)
        bare, bare_label = self.classifier_probability[place].max(dim=0)
        counts = Counter(choices.tolist())
        return {
            "class": names[label],
            "label": label,
            "probability": float(self.probability[place, label]),
            "mean_probability": float(self.sample_probability[place, :, label].mean()),
            "votes": {names[choice]: count for choice, count in counts.most_common()},
            "agreement": counts[label] / len(choices),
            "samples": [
                {"class": names[choice], "probability": share}
                for choice, share in zip(choices.tolist(), confidence.tolist(), strict=True)
            ],
            "classifier": {"class": names[int(bare_label)], "probability": float(bare)},
        }


@torch.no_grad()
def classify(defence: Defence, images: Tensor, seed: int) -> Answer:
    """Ask a defence about images (B, channels, H, W) in [0, 1]; tensors of the answer are on the CPU."""
    inputs = images.to(defence.purifier.mean.device)
    latents = torch.cat([draw_latents(defence, image, seed) for image in images])
    reconstructions = defence.decode(defence.condition(inputs), latents)
    sample_logits = defence.classify_samples(reconstructions)
    return Answer(
        # The exact view decides as log P does and has no ties where that saturates.
        defence.aggregate(sample_logits, "exact").argmax(dim=1).cpu(),
        defence.aggregate(sample_logits, "log-probability").exp().cpu(),
        sample_logits.softmax(dim=2).cpu(),
        in_precision(defence.classifier, defence.precision)(inputs).softmax(dim=1).cpu(),
        reconstructions.cpu(),
    )


def draw_latents(defence: Defence, image: Tensor, seed: int) -> Tensor:
    """Draw (1, N, Z) latents for one image (channels, H, W), decided by seed and pixels alone."""
    content = image.mul(255.0).round().to(torch.uint8).contiguous().numpy().tobytes()
    origin = generator(seed, "prediction", hashlib.sha256(content).hexdigest())
    return defence.draw_latents(1, defence.n_samples, origin)

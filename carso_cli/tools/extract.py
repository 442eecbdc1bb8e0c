"""List a classifier's layers, or write the internal representation of images to a file."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carso_cli.build import (
    build_classifier,
    build_purifier,
    classifier_fingerprint,
    device_for,
    load_images,
    untrained_classifier,
    user_classifier,
    with_layers,
)
from carso_cli.classifiers.layer_choice import default_layers
from carso_cli.data.decode import read_images
from carso_cli.data.image_set import ordered_batches
from carso_cli.defence.representation import extract_representation, layer_names, module_shapes
from carso_cli.errors import MissingError, RecipeError, UsageError, nearest
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runtime.precision import autocast, to_float32
from carso_cli.runtime.reporter import Reporter


@dataclass(frozen=True)
class Layer:
    """One layer that can be part of the internal representation."""

    name: str
    kind: str
    """Class of the module."""
    shape: tuple[int, ...]
    """Shape of its output for one image."""
    in_recipe: bool
    proposed: bool
    """Whether the rule behind Table 7 chooses it."""


def list_layers(recipe: Recipe, *, pattern: str = "*", kind: str | None = None) -> list[Layer]:
    """List the layers of the recipe's classifier that output one tensor; weights are not needed.

    Args:
        recipe: The recipe.
        pattern: Shell-style pattern that names must match.
        kind: `at` or `clean`, for classifiers of an entry point; the recipe's when None.

    Raises:
        UsageError: If no layer matches.
        RecipeError: If the classifier is unknown, or does not take the recipe's images.
    """
    # An entry point brings architecture and weights in one, so there is no untrained classifier of it.
    classifier = (
        build_classifier(recipe, kind or recipe.representation.kind)
        if recipe.classifier.family == "external"
        else user_classifier(untrained_classifier(recipe), recipe)
    )
    size = recipe.data.image_size
    shapes = module_shapes(classifier, torch.zeros(1, recipe.data.channels, size, size))
    # Modules that do not run, or return no single tensor, cannot be part of a representation.
    chosen = match_layers(pattern, [name for name in layer_names(classifier) if name in shapes])
    modules = dict(classifier.named_modules())
    recipe = with_layers(recipe, classifier)
    in_recipe, proposed = set(recipe.representation.layers), set(default_layers(classifier, shapes))
    return [
        Layer(name, type(modules[name]).__name__, shapes[name][1], name in in_recipe, name in proposed)
        for name in chosen
    ]


def check_layers(recipe: Recipe) -> str:
    """Check that a recipe's layers exist in its architecture and fit a purifier; no weights are needed.

    Returns:
        Why they cannot be checked; empty where they were.

    Raises:
        RecipeError: If one does not exist, or gives no map that a purifier reads.
    """
    if recipe.classifier.family in ("external", "given"):
        return "its layers are not checked, since the classifier is code of its own, which is not run"
    try:
        # On the meta device, where nothing is allocated; some architectures of the libraries need numbers.
        with torch.device("meta" if recipe.classifier.family == "wide-resnet" else "cpu"):
            classifier = untrained_classifier(recipe).eval()
            build_purifier(with_layers(recipe, classifier), classifier)
    except MissingError as error:
        return f"its layers are not checked: {error.message}"
    except UsageError as error:
        hint = error.hint and error.hint.replace("RECIPE", recipe.reference)
        raise RecipeError(f"{recipe.reference}, representation.layers: {error.message}", hint=hint) from None
    return ""


def match_layers(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that match a shell-style pattern, in their order.

    Raises:
        UsageError: If none does.
    """
    chosen = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not chosen:
        raise UsageError(
            f"no layer matches '{pattern}'; {nearest(pattern, names)}".rstrip("; "),
            hint="list all of them with: carso extract RECIPE --list",
        )
    return chosen


def extract(
    recipe: Recipe,
    *,
    out: Path,
    reporter: Reporter,
    split: str = "test",
    files: Sequence[Path] = (),
    pattern: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Write the internal representation of images to a safetensors file.

    Args:
        recipe: The recipe.
        out: File to write: one (M, channels, h, w) tensor per layer; for a split, `labels` and `indices` too.
        reporter: Where progress goes.
        split: `train` or `test`; unused when `files` are given.
        files: Image files to extract from instead of a split.
        pattern: Shell-style pattern of layer names; the recipe's layers when None.
        kind: `at` or `clean` classifier; the recipe's when None.
        limit: Number of images of the split, class-balanced.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Returns:
        `out`, `images` and `layers`: name, shape, mean and standard deviation of each.
    """
    target = device_for(recipe, device)
    classifier = build_classifier(recipe, kind or recipe.representation.kind, target)
    recipe = with_layers(recipe, classifier)
    layers = match_layers(pattern, layer_names(classifier)) if pattern else list(recipe.representation.layers)
    pixels, extra = _inputs(recipe, split, files, limit, reporter)
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad(), reporter.progress("extracting", len(pixels)) as progress:
        for part in ordered_batches(len(pixels), recipe.evaluation.batch_size):
            with autocast(recipe.precision, target):
                batch = extract_representation(classifier, pixels[part].to(target), layers)
            for layer, output in batch.items():
                # To the CPU batch by batch, since the outputs of a whole split may not fit on a GPU.
                parts[layer].append(to_float32(output).cpu())
            progress.advance(part.stop - part.start)
    outputs = {layer: torch.cat(chunks) for layer, chunks in parts.items()}
    metadata = {
        "recipe": recipe.name,
        "layers": layers,
        "classifier": classifier_fingerprint(classifier),
        "source": [str(file) for file in files] or split,
    }
    save_tensors(out, {**outputs, **extra}, metadata)
    summaries = [
        {
            "layer": layer,
            "shape": tuple(values.shape[1:]),
            "mean": float(values.mean()),
            "std": float(values.std()),
        }
        for layer, values in outputs.items()
    ]
    return {"out": str(out), "images": len(pixels), "layers": summaries}


def _inputs(
    recipe: Recipe, split: str, files: Sequence[Path], limit: int | None, reporter: Reporter
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images in [0, 1], and what is stored of them beside their representation."""
    if files:
        size, channels = recipe.data.image_size, recipe.data.channels
        return read_images(files, channels=channels, image_size=size), {}
    images = load_images(recipe, split, limit=limit, reporter=reporter)
    return images.pixels(slice(None)), {"labels": images.labels, "indices": images.indices}

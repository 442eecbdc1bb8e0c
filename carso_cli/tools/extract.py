"""List a classifier's layers, or write the internal representation of images to a file."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.build import (
    build_classifier,
    classifier_fingerprint,
    device_for,
    load_images,
    untrained_classifier,
    user_classifier,
)
from carso_cli.classifiers.layer_choice import default_layers
from carso_cli.data.batches import ordered_batches
from carso_cli.data.image_files import read_images
from carso_cli.defence.representation import extract_representation, layer_names, module_shapes
from carso_cli.errors import UsageError, nearest
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
    """List the layers of the recipe's classifier that give one tensor an image; weights are not needed.

    Args:
        recipe: The recipe.
        pattern: Shell-style pattern that names must match.
        kind: `at` or `clean`, for classifiers of an entry point; the recipe's when None.

    Raises:
        UsageError: If no layer matches.
        RecipeError: If the classifier is unknown, or does not take the recipe's images.
    """
    classifier = (
        build_classifier(recipe, kind or recipe.representation.kind)
        if recipe.classifier.family == "external"
        else user_classifier(untrained_classifier(recipe), recipe)
    )
    size = recipe.data.image_size
    shapes = module_shapes(classifier, torch.zeros(1, recipe.data.channels, size, size))
    chosen = match_layers(pattern, [name for name in layer_names(classifier) if name in shapes])
    modules = dict(classifier.named_modules())
    in_recipe, proposed = set(recipe.representation.layers), set(default_layers(classifier, shapes))
    return [
        Layer(name, type(modules[name]).__name__, shapes[name][1], name in in_recipe, name in proposed)
        for name in chosen
    ]


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
        out: File to write: one (M, channels, h, w) tensor a layer, with `labels` and `indices` for a split.
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
    layers = match_layers(pattern, layer_names(classifier)) if pattern else list(recipe.representation.layers)
    extra: dict[str, Tensor] = {}
    if files:
        size, channels = recipe.data.image_size, recipe.data.channels
        pixels = read_images(list(files), channels=channels, image_size=size)
    else:
        images = load_images(recipe, split, limit=limit, reporter=reporter)
        pixels = images.pixels(slice(0, len(images)))
        extra = {"labels": images.labels, "indices": images.indices}
    outputs = _forward(classifier, pixels, layers, recipe, target, reporter)
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
            "shape": tuple(output.shape[1:]),
            "mean": output.mean().item(),
            "std": output.std().item(),
        }
        for layer, output in outputs.items()
    ]
    return {"out": str(out), "images": len(pixels), "layers": summaries}


def _forward(
    classifier: nn.Module,
    pixels: Tensor,
    layers: Sequence[str],
    recipe: Recipe,
    device: torch.device,
    reporter: Reporter,
) -> OrderedDict[str, Tensor]:
    parts: OrderedDict[str, list[Tensor]] = OrderedDict((layer, []) for layer in layers)
    with torch.no_grad(), reporter.progress("extracting", len(pixels)) as progress:
        for part in ordered_batches(len(pixels), recipe.evaluation.batch_size):
            batch = pixels[part].to(device)
            with autocast(recipe.precision, device):
                outputs = extract_representation(classifier, batch, layers)
            for layer, output in outputs.items():
                parts[layer].append(to_float32(output).cpu())
            progress.advance(len(batch))
    return OrderedDict((layer, torch.cat(chunks)) for layer, chunks in parts.items())

"""Predict what training would cost, from one measured step: `--dry-run`.

- `require_weights`, `require_data`: whether training finds what it needs;
- `parameter_counts` of classifier and purifier, part by part;
- `estimate_cost` of `train-purifier`, `estimate_classifier_cost` of `train-classifier`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.build import (
    build_classifier,
    build_purifier,
    build_second_classifier,
    channels_last,
    data_root,
    device_for,
    search_folders,
    untrained_classifier,
    with_layers,
)
from carso_cli.classifiers.usable import check_gradient
from carso_cli.data.datasets import DATASETS, find_data, resolve_source
from carso_cli.data.image_set import ImageSet, held_out_count
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.distributed.launch import launch
from carso_cli.distributed.world import World
from carso_cli.io.download import fetch_command
from carso_cli.io.paths import data_home
from carso_cli.recipe.schema import Kind, Recipe
from carso_cli.runtime.precision import autocast, in_precision
from carso_cli.runtime.reporter import SILENT
from carso_cli.runtime.seed import generator
from carso_cli.runtime.timing import images_to_time, seconds_of
from carso_cli.training import classifier as classifier_training
from carso_cli.training.balanced_batch import gradients_per_image
from carso_cli.training.end_to_end import EndToEnd, adversarial_terms, refuse_trades
from carso_cli.training.purifier_step import initial_purifier
from carso_cli.training.selection import refuse_blind_choice

TRAINING_IMAGES = {
    **{"digits": 1442, "mnist": 60_000, "fashion-mnist": 60_000},
    **{"cifar10": 50_000, "cifar100": 50_000, "tinyimagenet200": 100_000},
}
"""Training images of the data sets whose size is known before they are read."""


def training_images(recipe: Recipe, limit: int | None) -> int | None:
    """Return how many images a training trains on, held-out ones left out; None where that is not known."""
    known = (limit, recipe.data.train_limit, TRAINING_IMAGES.get(recipe.data.name))
    # Limits cut and never add: the smallest number that is known holds.
    count = min(filter(None, known), default=None)
    if count is None:
        return None
    # An image of each class stays, see `split_holdout`.
    room = max(count - recipe.data.classes, 0)
    return count - min(held_out_count(count, recipe.data.holdout), room)


def require_weights(recipe: Recipe) -> None:
    """Raise what `train_purifier` would raise of classifiers, and of a purifier to start from."""
    classifier = build_classifier(recipe, recipe.representation.kind)
    build_second_classifier(recipe)
    if recipe.training.initial is not None:
        initial_purifier(with_layers(recipe, classifier), classifier)


def require_data(recipe: Recipe) -> str:
    """Look for the training images; nothing is read or downloaded.

    Returns:
        What training would have to download first; empty where they are on this machine.

    Raises:
        DataError: If they are in none of the places where training would look.
    """
    data, root = recipe.data, data_root(recipe)
    if data.train is not None:
        resolve_source(data.train, root or data_home(), search_folders(recipe))
    elif data.name in DATASETS and find_data(data.name, root=root) is None:
        return (
            f"the images of {data.name} are not on this machine; training downloads them first, as does "
            f"{fetch_command(recipe.reference)}"
        )
    return ""


def parameter_counts(recipe: Recipe) -> dict[str, int]:
    """Count parameters part by part, on the meta device: nothing is allocated."""
    # An entry point may load its weights, which the meta device would not take.
    with nullcontext() if recipe.classifier.family == "external" else torch.device("meta"):
        classifier = untrained_classifier(recipe)
        purifier = build_purifier(recipe, classifier)
    encoder = purifier.representation_encoder
    return {
        "classifier": _count(classifier),
        "input encoder": _count(purifier, "input_encoder."),
        "layer encoders": _count(encoder, "layer_encoders."),
        "representation FC": _count(encoder, "compressor."),
        "joint FC": _count(purifier, "joint_encoder."),
        "mean and log-variance": _count(purifier, "to_mean.", "to_log_variance."),
        "decoder": _count(purifier, "decoder."),
    }


def _count(module: nn.Module, *prefixes: str) -> int:
    """Return how many parameters a module has, under some names only if any are given."""
    found = module.named_parameters()
    # Every name starts with the empty text.
    return sum(parameter.numel() for name, parameter in found if name.startswith(prefixes or ""))


def estimate_cost(recipe: Recipe, *, device: str = "auto", limit: int | None = None) -> dict[str, Any]:
    """Predict the time of `train-purifier` from a training step on a few images, measured with its attacks.

    Args:
        recipe: The resolved recipe. Its weights are not needed: time does not depend on them.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        limit: Number of training images, when it is cut.

    Returns:
        `parameters` part by part, `images` (None when the data set's size is not known in advance),
        `seconds_per_image` of one epoch, `seconds` of the whole training (None likewise).

    Raises:
        RecipeError: If the recipe trains with TRADES, or keeps the best epoch without held-out images.
    """
    refuse_trades(recipe)
    refuse_blind_choice(recipe)
    target = device_for(recipe, device)
    # Frozen, as in training: gradients of its weights would cost time that training does not spend.
    classifier = untrained_classifier(recipe).to(target).eval().requires_grad_(False)
    if recipe.classifier.family == "external":
        check_gradient(classifier, channels=recipe.data.channels, image_size=recipe.data.image_size)
    elif recipe.classifier.family == "wide-resnet":
        channels_last(classifier)
    recipe = with_layers(recipe, classifier)
    # This process measures alone, and each takes its shard of a batch.
    per_image = seconds_per_image(recipe, classifier, target) / launch().size
    count = training_images(recipe, limit)
    return {
        "parameters": parameter_counts(recipe),
        "images": count,
        "seconds_per_image": per_image,
        "seconds": None if count is None else per_image * count * recipe.training.epochs,
    }


def seconds_per_image(
    recipe: Recipe, classifier: nn.Module, device: torch.device, images: int | None = None
) -> float:
    """Return the seconds that an image takes in an epoch, from one step on a few random images.

    Args:
        recipe: The recipe.
        classifier: Its classifier, frozen and on the device.
        device: Where to measure.
        images: Images in the step: with more, it is closer to a step of training; as many as fill the device
            when None.
    """
    images = images or images_to_time(device)
    purifier, size = build_purifier(recipe, classifier).to(device), recipe.data.image_size
    noise = torch.rand(images, recipe.data.channels, size, size, device=device)
    measured = _balanced_step if recipe.training.objective == "elbo" else _adversarial_step
    return measured(recipe, classifier, purifier, noise) / images


def _balanced_step(recipe: Recipe, classifier: nn.Module, purifier: Purifier, images: Tensor) -> float:
    """Return the seconds of a step on the ELBO, its attacks reckoned from one gradient."""

    def input_gradient() -> None:
        # Attacks ask for the gradient of the images alone.
        leaf = images.clone().requires_grad_()
        torch.autograd.grad(in_precision(classifier, recipe.precision)(leaf).sum(), leaf)

    def training_step() -> None:
        noise = torch.randn(len(images), purifier.latent_features, device=images.device)
        with autocast(recipe.precision, images.device):
            with torch.no_grad():
                representation = extract_representation(classifier, images, recipe.representation.layers)
            reconstruction, mean, log_variance = purifier(images, representation, noise)
        # Any beta takes the same time.
        loss = negative_elbo(reconstruction, images, mean, log_variance, 1.0)
        torch.autograd.grad(loss.total, list(purifier.parameters()))

    mix, batch_size = recipe.training.attack_mix, recipe.training.batch_size
    # A group of epochs makes its perturbed images once.
    gradients = gradients_per_image(mix, batch_size) / mix.reuse
    return gradients * seconds_of(input_gradient, images.device) + seconds_of(training_step, images.device)


def _adversarial_step(recipe: Recipe, classifier: nn.Module, purifier: Purifier, images: Tensor) -> float:
    """Return the seconds of a step through the whole defence, its attack among them."""
    trained = EndToEnd(recipe, classifier, purifier, None)
    labels = torch.arange(len(images), device=images.device) % recipe.data.classes
    # `grad` refuses parameters without gradients: under `adversarial`, those of the encoder.
    learning = [parameter for parameter in purifier.parameters() if parameter.requires_grad]

    def training_step() -> None:
        # A world of one: under torchrun this process measures alone.
        terms = adversarial_terms(trained, trained, images, labels, (0, 0), 1.0, World(images.device))
        torch.autograd.grad(terms["loss"], learning)

    return seconds_of(training_step, images.device)


def estimate_classifier_cost(
    recipe: Recipe, kind: Kind, *, device: str = "auto", limit: int | None = None
) -> dict[str, Any]:
    """Predict what `train-classifier` costs, from one step on random images; no data is read.

    Returns:
        `parameters`, `seconds_per_image` of training, and, where the recipe, `limit` or the data set's
        definition tells the number of images, `images` and `seconds` for all epochs.

    Raises:
        UsageError, RecipeError, WeightsError: See `initial_classifier`.
    """
    target, images = device_for(recipe, device), noise_images(recipe)
    setup = classifier_training.ClassifierSetup(recipe, kind, images, images, target, SILENT)
    classifier = classifier_training.initial_classifier(recipe).to(target)
    state = classifier_training.initial_state(setup, classifier)

    def training_step() -> None:
        classifier_training.train_step(setup, state, torch.arange(len(images)), (0, 0))

    each = seconds_of(training_step, target) / len(images)
    cost: dict[str, Any] = {"parameters": _count(classifier), "seconds_per_image": each}
    count = training_images(recipe, limit)
    if count is not None:
        cost |= {"images": count, "seconds": each * count * recipe.classifier.training.epochs}
    return cost


def noise_images(recipe: Recipe) -> ImageSet:
    """Return one batch of classifier training, random images in the recipe's shape."""
    data, count = recipe.data, recipe.classifier.training.batch_size
    shape = (count, data.channels, data.image_size, data.image_size)
    noise = generator(recipe.seed, "cost")
    images = torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)
    labels = torch.randint(0, data.classes, (count,), generator=noise)
    return ImageSet(images, labels, torch.arange(count), tuple(str(label) for label in range(data.classes)))

"""What training a purifier would cost, from a few images' worth of measured work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.build import (
    build_purifier,
    channels_last,
    device_for,
    training_images,
    untrained_classifier,
)
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.distributed.world import World
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.precision import autocast, in_precision
from carso_cli.runtime.timing import seconds_of
from carso_cli.training.balanced_batch import quarter_size
from carso_cli.training.end_to_end import EndToEnd, adversarial_terms

_IMAGES = 8


def parameter_counts(recipe: Recipe) -> dict[str, int]:
    """Count parameters part by part, on the meta device: nothing is allocated."""
    with torch.device("meta"):
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


def estimate_cost(recipe: Recipe, *, device: str = "auto", limit: int | None = None) -> dict[str, Any]:
    """Predict the time of `train-purifier` from a training step on 8 images, measured with its attacks.

    Args:
        recipe: The resolved recipe. Its weights are not needed: time does not depend on them.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        limit: Number of training images, when it is cut.

    Returns:
        `parameters` part by part, `images` (None when the data set's size is not known in advance),
        `seconds_per_image` of one epoch, `seconds` of the whole training (None likewise).
    """
    target = device_for(recipe, device)
    classifier = channels_last(untrained_classifier(recipe).to(target).eval().requires_grad_(False))
    purifier = build_purifier(recipe, classifier).to(target)
    measured = _balanced_step if recipe.training.objective == "elbo" else _adversarial_step
    per_image = measured(recipe, classifier, purifier) / _IMAGES
    count = training_images(recipe, limit)
    return {
        "parameters": parameter_counts(recipe),
        "images": count,
        "seconds_per_image": per_image,
        "seconds": None if count is None else per_image * count * recipe.training.epochs,
    }


def _balanced_step(recipe: Recipe, classifier: nn.Module, purifier: Purifier) -> float:
    """Return the seconds of a step on the ELBO, its attacks reckoned from one gradient."""
    images = _blank_images(recipe, purifier)

    def input_gradient() -> None:
        leaf = images.clone().requires_grad_()
        torch.autograd.grad(in_precision(classifier, recipe.precision)(leaf).sum(), leaf)

    def training_step() -> None:
        noise = torch.randn(_IMAGES, purifier.latent_features, device=images.device)
        with autocast(recipe.precision, images.device):
            with torch.no_grad():
                representation = extract_representation(classifier, images, recipe.representation.layers)
            reconstruction, mean, log_variance = purifier(images, representation, noise)
        loss = negative_elbo(reconstruction, images, mean, log_variance, 1.0)
        torch.autograd.grad(loss.total, list(purifier.parameters()))

    mix = recipe.training.attack_mix
    share = (
        2 * quarter_size(recipe.training.batch_size, mix.adversarial_fraction) / recipe.training.batch_size
    )
    gradients = share * (1 + mix.pgd_steps) / mix.reuse
    return gradients * seconds_of(input_gradient, images.device) + seconds_of(training_step, images.device)


def _adversarial_step(recipe: Recipe, classifier: nn.Module, purifier: Purifier) -> float:
    """Return the seconds of a step through the whole defence, its attack among them."""
    images, trained = _blank_images(recipe, purifier), EndToEnd(recipe, classifier, purifier, None)
    labels = torch.arange(_IMAGES, device=images.device) % recipe.data.classes
    learning = [parameter for parameter in purifier.parameters() if parameter.requires_grad]

    def training_step() -> None:
        terms = adversarial_terms(trained, trained, images, labels, (0, 0), 1.0, World(images.device))
        torch.autograd.grad(terms["loss"], learning)

    return seconds_of(training_step, images.device)


def _blank_images(recipe: Recipe, purifier: Purifier) -> Tensor:
    size = recipe.data.image_size
    return torch.rand(_IMAGES, recipe.data.channels, size, size, device=purifier.mean.device)


def _count(module: nn.Module, *prefixes: str) -> int:
    """Return how many parameters a module has, under some names only if any are given."""
    found = module.named_parameters()
    return sum(parameter.numel() for name, parameter in found if name.startswith(prefixes or ""))

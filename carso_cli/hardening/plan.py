"""The plan of a hardening: two recipes, that of a first purifier on the ELBO and that of the defence itself.

The second starts from the first one's purifier and trains it through the frozen classifier. How many epochs
each has follows from the time that there is and from one measured step of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.build import user_classifier
from carso_cli.classifiers.layer_choice import default_layers
from carso_cli.defence.representation import IMAGE, module_shapes
from carso_cli.errors import UsageError
from carso_cli.hardening.images import HardeningImages
from carso_cli.recipe.load import dump_recipe, load_recipe_text
from carso_cli.recipe.schema import Recipe
from carso_cli.training.preflight import seconds_per_image

TRAINING_SHARE = 0.65
"""Share of the time for training; the audits have the rest."""
START_SHARE = 0.25
"""Share of the training for the first purifier, on the ELBO."""
FEWEST_EPOCHS = 4
_MOST_EPOCHS = 100
_STEPS_PER_EPOCH = 12
_FEW_STEPS = 100
_FEWEST_IMAGES = 32
_MEASURED_IMAGES = 32
_HELD_OUT = 0.1
_MOST_HELD_OUT = 500
_VALIDATION = 1.25
"""What an epoch takes with its attack on the held-out images, in epochs without it."""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Args:
        start: Recipe of the first purifier, on the ELBO.
        final: Recipe of the defence.
        limit: Training images that are used, held-out ones included.
    """

    start: Recipe
    final: Recipe
    limit: int

    @property
    def warning(self) -> str:
        """What to tell whoever gave too little time to expect robustness; empty otherwise."""
        training = self.final.training
        steps = training.epochs * self.limit // training.batch_size
        if steps >= _FEW_STEPS:
            return ""
        return (
            f"there is time for {steps} steps through the classifier, and below {_FEW_STEPS} a purifier has "
            "hardly begun to learn: give more --time"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values."""
        return {"start": dump_recipe(self.start), "final": dump_recipe(self.final), "limit": self.limit}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Read what `as_dict` returned."""
        start, final = (load_recipe_text(values[key], source=f"plan, {key}") for key in ("start", "final"))
        return cls(start, final, int(values["limit"]))


def base_recipe(
    images: HardeningImages, *, target: Recipe | None, name: str, eps: float, norm: str, seed: int
) -> Recipe:
    """Return a recipe of the target's classifier and these images; its layers are still to be chosen.

    Args:
        images: With a class name for each logit.
        target: The target's own recipe, if it has one.
        name: What names the target on a command line.
        eps: Radius in pixel units.
        norm: `linf` or `l2`.
        seed: Seed of the training.

    Raises:
        UsageError: If the images are not square, or of a size that the purifier does not have.
    """
    _, channels, height, width = images.train.images.shape
    low, high = 28, 96
    if height != width or not low <= height <= high:
        raise UsageError(
            f"the images have {width}x{height} pixels; a purifier takes squares of {low} to {high}",
            hint="--resize N crops and resizes them, if the model takes that size",
        )
    pixels = images.train.pixels(slice(0, 5000))
    data: dict[str, Any] = {
        "name": images.dataset,
        "classes": len(images.train.classes),
        "channels": channels,
        "image_size": height,
        "mean": pixels.mean(dim=(0, 2, 3)).tolist(),
        "std": pixels.std(dim=(0, 2, 3)).clamp_min(1e-3).tolist(),
    }
    known = {} if target is None else target.model_dump(mode="json")
    if target is not None and images.dataset == target.data.name:
        data = known["data"]
    # Mirrored, an image of an unknown kind may belong to another class.
    flips = images.dataset.startswith("cifar")
    kind = known["representation"]["kind"] if known else "clean"
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:60] or "model"
    values = {
        "name": f"{slug}-hardened",
        "description": f"a purifier for {name}, trained by carso harden",
        "seed": seed,
        "data": data | {"holdout": min(_HELD_OUT, _MOST_HELD_OUT / len(images.train))},
        "threat": {"norm": norm, "eps": eps},
        "classifier": known.get(
            "classifier", {"family": "given", "given": name, "training": {"flip": flips}}
        ),
        "representation": {"kind": kind, "layers": [IMAGE]},
        "evaluation": {
            "n_samples": 1,
            "second_kind": kind,
            "pgd_step_size": 2.5 * eps / 40,
            "pgd_eot_step_size": 2.5 * eps / 200,
        },
    }
    return Recipe.model_validate(values)


def choose_layers(recipe: Recipe, classifier: nn.Module, condition: str | None, image: Tensor) -> Recipe:
    """Return the recipe with the layers that the rule of `extract --list` proposes, or the image alone.

    Args:
        recipe: The recipe.
        classifier: Its classifier.
        condition: `layers` or `image`; the image only where no layer is proposed when None.
        image: (1, channels, H, W) in [0, 1].

    Raises:
        UsageError: If layers are asked for and none gives square maps.
    """
    layers: tuple[str, ...] = ()
    if condition != "image":
        layers = default_layers(classifier, module_shapes(classifier, image))
    if condition == "layers" and not layers:
        raise UsageError(
            "no convolution of the classifier gives square maps to condition on",
            hint="--condition image conditions on the image alone",
        )
    return recipe.model_copy(
        update={"representation": recipe.representation.model_copy(update={"layers": layers or (IMAGE,)})}
    )


def make_plan(recipe: Recipe, classifier: nn.Module, *, count: int, seconds: float, start: Path) -> Plan:
    """Predict from measured steps what can be trained in a time.

    Args:
        recipe: With its layers.
        classifier: Its classifier, on its device.
        count: Training images that there are.
        seconds: For training.
        start: File of the first purifier.

    Raises:
        UsageError: If the time is too short for a training at all.
    """
    recipes = [_trained(recipe, _MEASURED_IMAGES, FEWEST_EPOCHS, initial) for initial in (None, start)]
    device = next(classifier.parameters(), torch.empty(0)).device
    costs = [_VALIDATION * seconds_per_image(one, classifier, device, _MEASURED_IMAGES) for one in recipes]
    shares = (seconds * START_SHARE, seconds * (1.0 - START_SHARE))
    # As many images as `FEWEST_EPOCHS` of both trainings have time for.
    limit = min(
        count, *(int(share / (FEWEST_EPOCHS * cost)) for share, cost in zip(shares, costs, strict=True))
    )
    if limit < min(_FEWEST_IMAGES, count):
        needed = FEWEST_EPOCHS * _FEWEST_IMAGES * max(costs[0] / START_SHARE, costs[1] / (1 - START_SHARE))
        raise UsageError(
            f"there are {seconds:.0f} s for training; {FEWEST_EPOCHS} epochs of {_FEWEST_IMAGES} images take "
            f"about {needed:.0f} s here",
            hint=f"--time {needed / TRAINING_SHARE / 60 + 1:.0f}m is the least that makes sense",
        )
    epochs = [
        min(max(int(share / (cost * limit)), FEWEST_EPOCHS), _MOST_EPOCHS)
        for share, cost in zip(shares, costs, strict=True)
    ]
    # Few steps teach nothing, however many epochs they make.
    batch_size = min(max(limit // _STEPS_PER_EPOCH, 8), 64 if limit < 5000 else 128)
    return Plan(
        _trained(recipe, batch_size, epochs[0], None), _trained(recipe, batch_size, epochs[1], start), limit
    )


def _trained(recipe: Recipe, batch_size: int, epochs: int, initial: Path | None) -> Recipe:
    """Return the recipe with the training of the first purifier, or with the one that starts from it."""
    plateau = (epochs - 1) // 3
    rate = {"initial": 5e-9, "plateau": 0.004} if initial is None else {"initial": 1e-4, "plateau": 0.001}
    eps, rises = recipe.threat.eps, min(1, epochs - 1)
    training: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": rate
        | {
            "final": 1e-4,
            "warmup_epochs": 1,
            "plateau_epochs": plateau,
            "annealing_epochs": epochs - 1 - plateau,
        },
        "beta_increase": {"first_epoch": rises, "last_epoch": max(rises, epochs // 3)},
        "attack_mix": {"pgd_steps": 5, "pgd_step_size": 2 * eps / 5},
    }
    if initial is not None:
        training |= {
            "objective": "adversarial",
            "initial": str(initial),
            "keep": "best",
            "optimiser": {"average_decay": 0.99},
            "adversarial": {"steps": 2, "n_samples": 1, "augment": True},
        }
    values = recipe.model_dump(mode="json") | {"training": training}
    values["purifier"] = {"condition_features": 128, "latent_features": 0}
    return Recipe.model_validate(values)


def checked_classifier(model: Any, recipe: Recipe, images: Tensor) -> nn.Module:  # noqa: ANN401  (any callable)
    """Return the frozen classifier as a module, once it is known to pass gradients on to its images.

    Raises:
        RecipeError: See `carso_cli.build.user_classifier`.
        UsageError: If no gradient leads from its logits to its input: none can be trained through it.
    """
    classifier = user_classifier(model, recipe)
    leaf = images.clone().requires_grad_()
    # Its own code may be anything: without a graph torch raises, too.
    try:
        (gradient,) = torch.autograd.grad(classifier(leaf).logsumexp(dim=1).sum(), leaf)
    except RuntimeError:
        gradient = torch.zeros_like(leaf)
    if not bool(gradient.isfinite().all()) or not bool((gradient != 0).any()):
        raise UsageError(
            f"{recipe.classifier.given or recipe.name} passes no gradient from its scores to its images, and "
            "the purifier is trained through it",
            hint="give a differentiable form of the model; `carso audit` measures any model as it is",
        )
    return classifier

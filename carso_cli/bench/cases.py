"""The cases that `carso bench` times: carso's work, and the naive baseline's.

Weights are random and of the recipe's shapes, images are noise: time depends on neither. Both sides get the
same weights, images, latents and starts, and their results agree in float32; the baseline has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.bench.naive_baseline import NaiveBaseline, NaiveTraining
from carso_cli.build import build_purifier, channels_last, untrained_classifier, with_layers
from carso_cli.classifiers.inference import inference_copy
from carso_cli.data.image_set import ImageSet
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.evaluation.models import Models, given_models
from carso_cli.evaluation.protocols import UNMEASURED_DRAWS
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.precision import autocast, in_precision
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.runtime.seed import derive_seed, generator, seeded
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.balanced_batch import BalancedBatch, part_size
from carso_cli.training.purifier_step import TrainingSetup, initial_state, train_step

_PLACE = (0, 0)
"""Epoch and batch of the timed training step."""


@dataclass(frozen=True, eq=False)
class Case:
    """One thing to time.

    Args:
        images: Images of one call.
        ours: What carso does; returns a tensor, or tensors by name.
        naive: The naive baseline of the same.
    """

    images: int
    ours: Callable[[], Any]
    naive: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Bench:
    """Models with random weights, and noise for images.

    Args:
        recipe: The recipe; its norm counts as linf and its aggregation as the paper's.
        device: Where everything is.
        batch_size: Images of every case; None for the recipe's own, cut on a CPU.
        halved: How often a batch is halved, for memory.
        classifier: Classifier, frozen.
        purifier: Purifier, frozen.
        reporter: Where messages go.
    """

    recipe: Recipe
    device: torch.device
    batch_size: int | None
    classifier: nn.Module
    purifier: Purifier
    reporter: Reporter = SILENT
    halved: int = 0

    def batch(self, count: int, most_on_cpu: int) -> tuple[Tensor, Tensor]:
        """Return uint8 noise images (B, channels, H, W) and labels (B,), on the CPU."""
        data = self.recipe.data
        if self.batch_size is not None:
            count = self.batch_size
        # A batch of the paper's size would take minutes a call.
        elif self.device.type == "cpu":
            count = min(count, most_on_cpu)
        count = max(count >> self.halved, 1)
        noise = generator(self.recipe.seed, "bench")
        shape = (count, data.channels, data.image_size, data.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
        return images, torch.randint(0, data.classes, (count,), generator=noise)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] and labels for everything but training."""
        images, labels = self.batch(self.recipe.evaluation.batch_size, most_on_cpu=16)
        return images.to(self.device) / 255.0, labels.to(self.device)

    def naive(self) -> NaiveBaseline:
        """Return the naive baseline, with the same weights."""
        return NaiveBaseline(self.classifier, self.purifier, self.recipe.representation.layers)

    def models(self) -> Models:
        """Return the defence as `carso evaluate` runs it."""
        recipe = self.recipe
        defence = Defence(
            self.classifier,
            self.purifier,
            recipe.representation.layers,
            n_samples=recipe.evaluation.n_samples,
            precision=recipe.precision,
        )
        return given_models(recipe, self.device, defence=defence, reporter=self.reporter)

    def target(self) -> ClassifierTarget:
        """Return the classifier as it is attacked, in the recipe's precision."""
        model = inference_copy(self.classifier, compile=self.recipe.compile, reporter=self.reporter)
        return ClassifierTarget(in_precision(model, self.recipe.precision))


def set_up(
    recipe: Recipe, device: torch.device, batch_size: int | None = None, reporter: Reporter = SILENT
) -> Bench:
    """Build the recipe's models with random weights; a classifier of an installed package keeps its own."""
    # The naive baseline has no other norm.
    threat = recipe.threat.model_copy(update={"norm": "linf"})
    # A purifier that training starts from belongs to trained weights, and these are random.
    training = recipe.training.model_copy(update={"initial": None})
    recipe = recipe.model_copy(update={"threat": threat, "training": training})
    with seeded(recipe.seed, "bench weights"):
        classifier = untrained_classifier(recipe)
        recipe = with_layers(recipe, classifier)
        purifier = build_purifier(recipe, classifier)
    for module in (classifier, purifier):
        module.to(device).eval().requires_grad_(False)
        # As in training and evaluation; the baseline copies its weights into contiguous memory.
        if module is purifier or recipe.classifier.family == "wide-resnet":
            channels_last(module)
    return Bench(recipe, device, batch_size, classifier, purifier, reporter)


def _classifier_forward(bench: Bench) -> Case:
    (images, _), target, naive = bench.inputs(), bench.target(), bench.naive()
    return Case(len(images), lambda: target(images), lambda: naive.classify(images))


def _classifier_gradient(bench: Bench) -> Case:
    # One EoT sample: the bare classifier has nothing random.
    (images, labels), target, naive = bench.inputs(), bench.target(), bench.naive()
    return Case(
        len(images),
        lambda: target.loss_and_gradient(images, labels, cross_entropy, 1).gradient,
        lambda: naive.classifier_gradient(images, labels),
    )


def _defence_forward(bench: Bench) -> Case:
    (images, _), naive = bench.inputs(), bench.naive()
    defence = cast(Defence, bench.models().defence)
    latents = defence.draw_latents(len(images), generator=generator(bench.recipe.seed, "bench latents"))
    ours = torch.no_grad()(lambda: defence(images, latents=latents))
    return Case(len(images), ours, lambda: naive.defend(images, latents))


def _eot_step(bench: Bench) -> Case:
    (images, labels), baseline, models = bench.inputs(), bench.naive(), bench.models()
    section = bench.recipe.evaluation
    draws, step_size = section.eot_draws or UNMEASURED_DRAWS, section.pgd_eot_step_size
    defence, eps = models.require_defence(), bench.recipe.threat.eps
    threat = ThreatModel("linf", eps)

    def latents() -> torch.Generator:
        # A fresh one per call: both sides draw the same latents in every round.
        return generator(bench.recipe.seed, "bench latents")

    def ours() -> Tensor:
        target = DefenceTarget(
            defence, "exact", samples_per_pass=models.samples_per_pass, generator=latents()
        )
        gradient = target.loss_and_gradient(images, labels, cross_entropy, draws).gradient
        return threat.project(images + step_size * threat.ascent_direction(gradient), images)

    def naive() -> Tensor:
        drawn = defence.draw_latents(draws * len(images), generator=latents())
        # Row k * B + b is draw k of image b, as `DefenceTarget` counts.
        drawn = drawn.reshape(draws, len(images), *drawn.shape[1:])
        return baseline.eot_step(images, images, labels, drawn, eps=eps, step_size=step_size)

    return Case(len(images), ours, naive)


def _training_step(bench: Bench) -> Case:
    recipe, device = bench.recipe, bench.device
    images, labels = bench.batch(recipe.training.batch_size, most_on_cpu=64)
    positions = torch.arange(len(images))
    classes = tuple(str(label) for label in range(recipe.data.classes))
    # On the device, as in training.
    train = ImageSet(images, labels, positions, classes).to(device)
    perturb = BalancedBatch(recipe, bench.classifier, bench.reporter)
    # Without reuse: from a cache, later rounds would not make their attacks.
    holdout, cache = train.select(positions[:0]), AdversarialCache(reuse=1)
    setup = TrainingSetup(recipe, bench.classifier, train, holdout, perturb, cache, device, SILENT)
    state = initial_state(setup)
    # `train_purifier` does this at the start of each epoch.
    state.purifier.train()
    baseline = NaiveTraining(bench.classifier, state.purifier, recipe.representation.layers, recipe.training)
    clean, known = train.pixels(slice(None)), labels.to(device)
    quarter = part_size(recipe.training.attack_mix, len(clean))

    def naive() -> Tensor:
        # The same streams of random numbers as `train_step` reads.
        with seeded(derive_seed(recipe.seed, "perturbation", *_PLACE), "pgd-start"):
            starts = torch.empty_like(clean[: 2 * quarter]).uniform_(-1.0, 1.0)
        source = generator(recipe.seed, "posterior", *_PLACE)
        noise = torch.randn(len(clean), state.purifier.latent_features, generator=source).to(device)
        return baseline.step(clean, known, starts, noise, eps=recipe.threat.eps)

    return Case(len(images), lambda: train_step(setup, state, positions, _PLACE, 1.0), naive)


def _extraction(bench: Bench) -> Case:
    (images, _), naive = bench.inputs(), bench.naive()

    @torch.no_grad()
    def ours() -> dict[str, Tensor]:
        with autocast(bench.recipe.precision, bench.device):
            return extract_representation(bench.classifier, images, bench.recipe.representation.layers)

    return Case(len(images), ours, lambda: naive.extract(images))


CASES: dict[str, Callable[[Bench], Case]] = {
    "classifier-forward": _classifier_forward,
    "classifier-gradient": _classifier_gradient,
    "defence-forward": _defence_forward,
    "eot-step": _eot_step,
    "training-step": _training_step,
    "extraction": _extraction,
}
"""Name to what sets a case up, in the order in which they are shown."""

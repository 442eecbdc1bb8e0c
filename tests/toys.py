"""A tiny run on digits, and toy defences of known robustness: one healthy, two that mask gradients."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carso_cli.classifiers import load
from carso_cli.data.image_set import ImageSet
from carso_cli.defence.aggregation import aggregate
from carso_cli.evaluation.run import evaluate
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe

TINY = (
    "representation.layers=[layer.1.block.0.conv_0, layer.2.block.0.conv_1]",
    "data.train_limit=48",
    "data.holdout=0.1",
    "training.epochs=2",
    "training.learning_rate.warmup_epochs=1",
    "training.learning_rate.plateau_epochs=1",
    "training.learning_rate.annealing_epochs=0",
    "training.beta_increase.first_epoch=0",
    "training.beta_increase.last_epoch=1",
    "training.batch_size=24",
    "training.attack_mix.pgd_steps=1",
    "purifier.condition_features=16",
    "purifier.latent_features=4",
    "purifier.layer_convolutions=1",
    "evaluation.n_samples=3",
    "evaluation.scoring_draws=3",
    "evaluation.batch_size=3",
    "evaluation.pgd_steps=3",
    "evaluation.pgd_step_size=0.05",
    "evaluation.eot_draws=1",
    "evaluation.pgd_eot_steps=3",
    "evaluation.pgd_eot_step_size=0.04",
    "evaluation.apgd_steps=4",
    "evaluation.square_queries=10",
)


EPS = 0.1
SHAPE = (1, 4, 4)
CLASSES = 4  # with three, the DLR loss is constant once an image is fooled
BUDGET = (
    f"threat.eps={EPS}",
    "evaluation.batch_size=4",
    "evaluation.pgd_steps=6",
    "evaluation.pgd_step_size=0.04",
    "evaluation.apgd_steps=8",
    "evaluation.eot_draws=2",
    "evaluation.pgd_eot_steps=6",
    "evaluation.pgd_eot_step_size=0.04",
    "evaluation.square_queries=40",
    "evaluation.scoring_draws=5",
    "evaluation.n_samples=3",
)


@dataclass(frozen=True)
class DigitsRun:
    """A trained run, its recipe, and what that changes of the shipped recipe `digits`."""

    folder: Path
    recipe: Recipe
    overrides: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        """The overrides as words of a command line."""
        return [word for value in self.overrides for word in ("--set", value)]


class OwnClassifier(nn.Module):
    """No WideResNet: two convolutions of any image size, its weights those of a fixed seed."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            first, second = nn.Conv2d(channels, 4, 3, stride=2), nn.Conv2d(4, 6, 3, stride=2)
            self.head = nn.Linear(6, 10)
        self.stage = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage(images).mean(dim=(2, 3)))
        return logits


def offer(
    monkeypatch: pytest.MonkeyPatch, groups: dict[str, dict[str, str]], build: object = OwnClassifier
) -> None:
    """Install a package `my_package` with the function `build` and these entry points."""
    package = types.ModuleType("my_package")
    package.__dict__["build"] = build
    monkeypatch.setitem(sys.modules, "my_package", package)
    points = [
        EntryPoint(name, value, group) for group, named in groups.items() for name, value in named.items()
    ]
    monkeypatch.setattr(load, "entry_points", lambda group: [p for p in points if p.group == group])


class LinearDefence:
    """Logits W x, with noise on each sample's; a class's weights are a block of 4 pixels."""

    latent_features = CLASSES

    def __init__(self, *, noise: float = 0.05, scale: float = 4.0, n_samples: int = 3) -> None:
        self.weights = scale * torch.eye(CLASSES).repeat_interleave(16 // CLASSES, dim=1)
        self.noise = noise
        self.n_samples = n_samples
        self.aggregation = "doubly-exponential"

    def classifier(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.T

    second_classifier = classifier

    def condition(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def draw_latents(
        self, batch: int, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.randn(batch, n_samples or self.n_samples, CLASSES, generator=generator)

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        return condition[:, None].expand(-1, latents.shape[1], -1).reshape(*latents.shape[:2], *SHAPE)

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        return self.classifier(condition)[:, None] + self.noise * latents

    def aggregate(self, sample_logits: Tensor, view: str = "log-probability") -> Tensor:
        return aggregate(sample_logits, self.aggregation, view)


class SaturatingDefence(LinearDefence):
    """Every view overflows as the published release does, so no gradient is left."""

    def aggregate(self, sample_logits: Tensor, view: str = "log-probability") -> Tensor:
        if view == "log-probability":
            return super().aggregate(sample_logits, view)
        probability = (1000.0 * sample_logits.sum(dim=1)).softmax(dim=1)
        return torch.log(probability / (1.0 - probability))


class ShatteredDefence(LinearDefence):
    """Rounds the image to 64 levels first, so every gradient is zero."""

    def condition(self, images: Tensor) -> Tensor:
        return (images.flatten(1) * 64).round() / 64


def images_with_margins(defence: LinearDefence, shares: list[float]) -> ImageSet:
    """Images in mid-range whose lead over every other class is a share of what EPS can take away.

    Raising the label's 4 pixels by d leads by 4 d times the scale; EPS takes away 4 * 2 EPS times it.
    """
    labels = torch.arange(len(shares)) % CLASSES
    pixels = torch.full((len(shares), 16), 0.5)
    for row, (label, share) in enumerate(zip(labels.tolist(), shares, strict=True)):
        pixels[row, 4 * label : 4 * label + 4] += 2 * EPS * share
    raw = (pixels * 255).round().to(torch.uint8).reshape(-1, *SHAPE)
    return ImageSet(raw, labels, torch.arange(len(shares)) + 100, ("a", "b", "c", "d"))


def small_recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", [*BUDGET, *overrides])


def run_toy(run: Path, reporter: Any, **options: Any) -> dict[str, Any]:
    """The evaluation that the interruption tests cut short."""
    defence = LinearDefence(noise=1.0)
    images = images_with_margins(defence, [0.3, 0.6, 0.9, 1.1, 1.3, 1.6, 0.5, 1.2, 2.0, -0.5, 0.95])
    return evaluate(
        small_recipe(),
        run=run,
        reporter=reporter,
        defence=defence,
        images=images,
        device="cpu",
        **{"attack": "adaptive", **options},
    )

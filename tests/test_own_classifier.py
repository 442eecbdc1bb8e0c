"""A classifier of one's own: as a module in Python, and as an entry point of an installed package."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from carso_cli import load_defence
from carso_cli.build import build_purifier, load_images
from carso_cli.classifiers import load
from carso_cli.cli.app import run as carso
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.representation import extract_representation
from carso_cli.errors import UsageError, WeightsError
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.training.purifier import train_purifier

SHORT = (
    "training.epochs=1",
    "training.learning_rate.warmup_epochs=1",
    "training.learning_rate.plateau_epochs=0",
    "training.learning_rate.annealing_epochs=0",
    "training.beta_increase.first_epoch=0",
    "training.beta_increase.last_epoch=0",
    "training.batch_size=20",
    "training.attack_mix.pgd_steps=1",
    "purifier.condition_features=12",
    "purifier.latent_features=4",
    "representation.layers=[stage.0, stage.2]",
)
SIZES = [(channels, size) for channels in (1, 3) for size in (28, 32, 64, 96)]


class Own(nn.Module):
    """No WideResNet: two convolutions of any image size, its weights those of a fixed seed."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            first, second = nn.Conv2d(channels, 4, 3, stride=2), nn.Conv2d(4, 6, 3, stride=2)
            self.head = nn.Linear(6, 10)
        self.stage = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage(images).mean(dim=(2, 3)))
        return logits


def recipe_for(channels: int, size: int, *more: str) -> Recipe:
    values = (
        f"data.channels={channels}",
        f"data.image_size={size}",
        f"data.mean={[0.3] * channels}",
        f"data.std={[0.3] * channels}",
        "purifier.layer_convolutions=null",
    )
    return load_recipe("digits", (*SHORT, *values, *more))


@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_a_defence_around_it(channels: int, size: int) -> None:
    recipe = recipe_for(channels, size)
    classifier = Own(channels).eval()
    purifier = build_purifier(recipe, classifier)
    images = torch.rand(2, channels, size, size)
    representation = extract_representation(classifier, images, recipe.representation.layers)
    reconstructions, mean, log_variance = purifier.train()(images, representation, torch.randn(2, 4))
    assert reconstructions.shape == images.shape
    negative_elbo(reconstructions, images, mean, log_variance, 1.0).total.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in purifier.parameters())
    defence = Defence(classifier=classifier, purifier=purifier, layers=recipe.representation.layers)
    assert defence(images).shape == (2, 10)
    assert defence.purify(images, n_samples=3).shape == (2, 3, channels, size, size)
    with pytest.raises(UsageError, match=r"stage\.9"):
        Defence(classifier=classifier, purifier=purifier, layers=["stage.0", "stage.9"])


def test_training_with_a_module(tmp_path: Path) -> None:
    recipe, run = recipe_for(1, 28), tmp_path / "run"
    train_purifier(recipe, run=run, reporter=SilentReporter(), device="cpu", limit=40, classifier=Own())
    images = load_images(recipe, "test", limit=10).pixels(slice(None))
    defence = load_defence(run, device="cpu", classifier=Own())
    latents = defence.draw_latents(10, generator=torch.Generator().manual_seed(0))
    prediction = defence(images, latents=latents)
    assert prediction.shape == (10, 10)
    torch.testing.assert_close(prediction.exp().sum(dim=1), torch.ones(10))
    changed = Own()
    changed.head.bias.data += 1.0
    with pytest.raises(WeightsError, match="trained for a classifier with checksum"):
        load_defence(run, device="cpu", classifier=changed)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package `my_package` with the entry point `mine = my_package:build`."""
    package = types.ModuleType("my_package")
    package.__dict__["build"] = Own
    monkeypatch.setitem(sys.modules, "my_package", package)
    points = [EntryPoint("mine", "my_package:build", load.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(load, "entry_points", lambda group: points)


@pytest.mark.usefixtures("offered")
def test_the_command_line_with_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = (
        "classifier.family=external",
        "classifier.at.source=entry-point",
        "classifier.at.name=mine",
        "classifier.clean=null",
    )
    recipe = recipe_for(1, 28, *named)
    values = ["data.channels=1", "data.image_size=28", "data.mean=[0.3]", "data.std=[0.3]"]
    options = [text for value in (*SHORT, *values, *named) for text in ("--set", value)]
    assert carso(["train-purifier", "digits", *options, "--limit", "40", "--run", "theirs"]) == 0
    train_purifier(
        recipe, run=Path("ours"), reporter=SilentReporter(), device="cpu", limit=40, classifier=Own()
    )
    images = torch.rand(3, 1, 28, 28)
    theirs, ours = load_defence("theirs", device="cpu"), load_defence("ours", device="cpu", classifier=Own())
    latents = ours.draw_latents(3)
    assert torch.equal(theirs(images, latents=latents), ours(images, latents=latents))

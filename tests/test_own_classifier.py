"""A classifier of one's own: as a module in Python, and as an entry point of an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
from carso_cli.training.purifier import train_purifier
from tests.toys import TINY, OwnClassifier, offer

LAYERS = "representation.layers=[stage.0, stage.2]"
SIZES = [(channels, size) for channels in (1, 3) for size in (28, 32, 64, 96)]


def overrides(channels: int, size: int, *more: str) -> tuple[str, ...]:
    moments = [0.3] * channels
    data = (
        f"data.channels={channels}",
        f"data.image_size={size}",
        f"data.mean={moments}",
        f"data.std={moments}",
    )
    return (*TINY, LAYERS, *data, "purifier.layer_convolutions=null", *more)


def train(recipe: Recipe, run: Path) -> None:
    train_purifier(recipe, run=run, device="cpu", limit=40, classifier=OwnClassifier(1))


@pytest.mark.parametrize(("channels", "size"), [*SIZES, pytest.param(3, 224, marks=pytest.mark.slow)])
def test_a_defence_around_it(channels: int, size: int) -> None:
    recipe = load_recipe("digits", overrides(channels, size))
    classifier = OwnClassifier(channels).eval()
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


@pytest.mark.slow
def test_training_with_a_module(tmp_path: Path) -> None:
    recipe, run = load_recipe("digits", overrides(1, 28)), tmp_path / "run"
    train(recipe, run)
    images = load_images(recipe, "test", limit=10).pixels(slice(None))
    defence = load_defence(run, device="cpu", classifier=OwnClassifier(1))
    latents = defence.draw_latents(10, generator=torch.Generator().manual_seed(0))
    prediction = defence(images, latents=latents)
    assert prediction.shape == (10, 10)
    torch.testing.assert_close(prediction.exp().sum(dim=1), torch.ones(10))
    changed = OwnClassifier(1)
    changed.head.bias.data += 1.0
    with pytest.raises(WeightsError, match="trained for a classifier with checksum"):
        load_defence(run, device="cpu", classifier=changed)


@pytest.mark.slow
def test_the_command_line_with_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    offer(monkeypatch, {load.ENTRY_POINT_GROUP: {"mine": "my_package:build"}}, lambda: OwnClassifier(1))
    section = "{family: external, at: {source: entry-point, name: mine}, clean: null}"
    chosen = overrides(1, 28, f"classifier={section}")
    options = [text for value in chosen for text in ("--set", value)]
    assert carso(["train-purifier", "digits", *options, "--limit", "40", "--run", "theirs"]) == 0
    train(load_recipe("digits", chosen), Path("ours"))
    images = torch.rand(3, 1, 28, 28)
    theirs = load_defence("theirs", device="cpu")
    ours = load_defence("ours", device="cpu", classifier=OwnClassifier(1))
    latents = ours.draw_latents(3)
    assert torch.equal(theirs(images, latents=latents), ours(images, latents=latents))

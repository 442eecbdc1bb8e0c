"""A classifier of one's own: as a module in Python, and as an entry point of an installed package."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli import load_defence
from carso_cli.build import build_purifier, load_images, untrained_classifier, with_layers
from carso_cli.classifiers import load
from carso_cli.classifiers.registry import find_record
from carso_cli.cli.app import run as carso
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.representation import extract_representation
from carso_cli.errors import RecipeError, UsageError, WeightsError
from carso_cli.evaluation.setup import prepare_evaluation
from carso_cli.io.paths import weights_home
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.tools.extract import list_layers
from carso_cli.training.preflight import estimate_cost
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


EXTERNAL = "classifier={family: external, at: {source: entry-point, name: mine}, clean: null}"


class _Odd(OwnClassifier):
    def __init__(self, kind: str) -> None:
        super().__init__(1)
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        if self.kind == "no_grad":
            with torch.no_grad():
                return super().forward(images)
        if self.kind == "numpy":
            return super().forward(torch.from_numpy(images.detach().numpy()))
        if self.kind == "rounds":
            return super().forward((images * 7).round() / 7)
        if self.kind == "changes":
            return super().forward(images.sub_(0.5))
        logits = super().forward(images)
        return {"tuple": (logits, images), "dictionary": {"logits": logits}, "view": logits.view(-1, 10)}[
            self.kind
        ]


@pytest.mark.parametrize("command", ["dry run", "training"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_grad", "gives no gradient: it runs under torch.no_grad"),
        ("numpy", "gives no gradient"),
        ("rounds", "gradient is zero in every pixel"),
        ("tuple", "returns a tuple, not a tensor of logits"),
        ("dictionary", "returns a dict, not a tensor"),
        ("changes", "changes the images that it is given"),
    ],
)
def test_what_a_classifier_cannot_do_is_told_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, message: str, command: str
) -> None:
    offer(monkeypatch, {load.ENTRY_POINT_GROUP: {"mine": "my_package:build"}}, lambda: _Odd(kind))
    recipe = load_recipe("digits", overrides(1, 28, EXTERNAL))
    train = partial(train_purifier, run=tmp_path / "run", device="cpu", limit=40)
    start = train if command == "training" else partial(estimate_cost, device="cpu")
    with pytest.raises(RecipeError, match=message):
        start(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["no_grad", "rounds"])
def test_an_evaluation_refuses_a_classifier_without_gradients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    offer(monkeypatch, {load.ENTRY_POINT_GROUP: {"mine": "my_package:build"}}, lambda: _Odd(kind))
    recipe = load_recipe("digits", overrides(1, 28, EXTERNAL))
    chosen: Any = {"target": "classifier", "limit": 4, "device": "cpu"}
    with pytest.raises(RecipeError, match="gradient") as caught:
        prepare_evaluation(recipe, run=tmp_path / "run", reporter=SILENT, attack="pgd", **chosen)
    assert "carso audit digits" in (caught.value.hint or "")
    # A black-box attack follows none.
    prepare_evaluation(recipe, run=tmp_path / "run", reporter=SILENT, attack="square", **chosen)


def test_a_dry_run_with_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, {load.ENTRY_POINT_GROUP: {"mine": "my_package:build"}}, lambda: OwnClassifier(1))
    recipe = load_recipe("digits", overrides(1, 28, EXTERNAL, "representation.layers=auto"))
    cost = estimate_cost(recipe, device="cpu")
    expected = sum(parameter.numel() for parameter in OwnClassifier(1).parameters())
    assert cost["parameters"]["classifier"] == expected
    assert cost["seconds_per_image"] > 0


@pytest.mark.slow
def test_auto_layers_are_those_that_the_list_proposes_and_a_run_stores_them(
    tmp_path: Path, recorder: Any
) -> None:
    recipe = load_recipe("digits", overrides(1, 28, "representation.layers=auto"))
    train_purifier(
        recipe, run=tmp_path / "run", device="cpu", limit=40, classifier=OwnClassifier(1), reporter=recorder
    )
    stored = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert stored.representation.layers == ("stage.0", "stage.2")
    # Its weights are random ones.
    assert any("no better than chance" in told for told in recorder.warned)
    shipped = load_recipe("digits")
    auto = load_recipe("digits", ["representation.layers=auto"])
    found = with_layers(auto, untrained_classifier(auto)).representation.layers
    assert list(found) == [layer.name for layer in list_layers(shipped) if layer.proposed]


@pytest.mark.slow
def test_a_run_is_used_from_anywhere_and_after_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, other = tmp_path / "work", tmp_path / "other"
    (work / "weights").mkdir(parents=True)
    other.mkdir()
    monkeypatch.chdir(work)
    weights = find_record("shipped", "digits-at", "digits").file
    shutil.copy(weights, "weights/mine.safetensors")
    change = "classifier.at={source: file, file: weights/mine.safetensors}"
    train_purifier(load_recipe("digits", [*TINY, change]), run=Path("runs/mine"), device="cpu", limit=40)
    images = torch.rand(2, 3, 32, 32)
    expected = load_defence("runs/mine", device="cpu").condition(images)
    monkeypatch.chdir(other)
    shutil.copytree(work / "runs" / "mine", "alone")
    for run in (work / "runs" / "mine", Path("alone")):
        torch.testing.assert_close(load_defence(run, device="cpu").condition(images), expected)
    work.rename(tmp_path / "renamed")
    run = tmp_path / "renamed" / "runs" / "mine"
    torch.testing.assert_close(load_defence(run, device="cpu").condition(images), expected)
    with pytest.raises(WeightsError, match=r"mine\.safetensors' are missing") as caught:
        load_defence("alone", device="cpu")
    assert "train" not in caught.value.hint.replace("of its training", "").replace("was trained", "")
    # The hint works.
    weights_home().mkdir(parents=True, exist_ok=True)
    shutil.copy(weights, weights_home() / "mine.safetensors")
    assert str(weights_home() / "mine.safetensors") in caught.value.hint
    torch.testing.assert_close(load_defence("alone", device="cpu").condition(images), expected)

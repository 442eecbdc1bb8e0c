"""`carso harden` as a new user runs it, and what it is made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from carso_cli import harden
from carso_cli.build import build_purifier, load_defence, user_classifier
from carso_cli.cli.app import run as carso
from carso_cli.data.image_set import ImageSet
from carso_cli.data.labelled_images import splits_of
from carso_cli.defence.representation import IMAGE, extract_representation
from carso_cli.errors import UsageError
from carso_cli.hardening import outcome, plan
from carso_cli.hardening.images import HardeningImages, split_images
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.training.optim import MovingAverage
from carso_cli.training.selection import best_epoch

Capture = pytest.CaptureFixture[str]

MODEL = """
import torch
from torch import nn

class Brightness(nn.Module):
    '''Tells dark images from bright ones by a strip of pixels: brittle, and without a convolution.'''
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))
    def forward(self, images):
        mean = images[:, :, :2].mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1) * self.scale

def build():
    return Brightness().eval()

def answers(images):
    return build()(images).softmax(dim=1)

def hard(images):
    return torch.nn.functional.one_hot(build()(images).argmax(dim=1), 2).float()
"""


def bright_and_dark(count: int) -> tuple[Tensor, Tensor]:
    """Grey images of 28x28 pixels: the strip that `Brightness` reads says little, the rest much."""
    labels = torch.arange(count) % 2
    noise = torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.1
    images = noise + torch.where(labels == 1, 0.7, 0.2)[:, None, None, None]
    images[:, :, :2] = 0.45 + 0.1 * labels[:, None, None, None]
    return images, labels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "model.py").write_text(MODEL)
    images, labels = bright_and_dark(60)
    np.savez(tmp_path / "images.npz", images=images.numpy(), labels=labels.numpy())
    return tmp_path


def recipe_of(images: ImageSet, **changes: Any) -> Recipe:
    values = {"target": None, "name": "model.py:build", "eps": 0.1, "norm": "linf", "seed": 0} | changes
    return plan.base_recipe(HardeningImages(images, images), **values)


def image_set(count: int = 8, size: int = 28) -> ImageSet:
    labels = torch.arange(count) % 2
    return ImageSet(torch.rand(count, 3, size, size), labels, torch.arange(count), ("dark", "bright"))


@pytest.mark.slow
def test_from_an_empty_folder_to_a_hardened_model(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock decides how long to train: here, always the fewest epochs.
    monkeypatch.setattr(plan, "_MOST_EPOCHS", plan.FEWEST_EPOCHS)
    arguments = ["harden", "model.py:build", "--data", "images.npz", "--eps", "0.1", "--out", "out"]
    budget = ["--budget", "quick", "--limit", "6", "--time", "1h"]
    assert carso([*arguments, *budget]) == 0
    told = capsys.readouterr().out
    assert told.startswith("robust accuracy 0.000 -> ")
    assert "carso predict IMAGE --run out --classifier model.py:build" in told
    summary = json.loads((folder / "out" / "harden.json").read_text())
    assert summary["before"]["robust"]["accuracy"] == 0.0
    assert summary["before"]["n_images"] == summary["after"]["n_images"] == 6
    same = [
        {row["attack"] for row in summary[part]["attacks"] if row["attack"] != "noise"}
        for part in ("before", "after")
    ]
    assert same[0] == same[1]
    page = (folder / "out" / "harden.html").read_text()
    assert summary["headline"].replace(">", "&gt;") in page
    assert (folder / "out" / "examples.png").read_bytes().startswith(b"\x89PNG")

    # The run is a run: whoever names the code again can use it.
    given = ["--classifier", "model.py:build"]
    assert carso(["audit", "out", "--data", "images.npz", "--limit", "4", "--dry-run", *given]) == 0
    assert carso(["export", "--run", "out", "--json", *given]) == 0
    assert carso(["audit", "out", "--data", "images.npz"]) == 2
    assert "name it yourself with --classifier model.py:build" in capsys.readouterr().err

    # A second start is refused; a resumed one finds everything done.
    assert carso([*arguments, *budget]) == 2
    assert "--resume" in capsys.readouterr().err
    assert carso([*arguments, *budget, "--resume"]) == 0
    assert capsys.readouterr().out.startswith(summary["headline"].partition(" on ")[0])


@pytest.mark.slow
def test_from_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MOST_EPOCHS", plan.FEWEST_EPOCHS)
    images, labels = bright_and_dark(40)
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    options: Any = {"eps": 0.1, "budget": "quick", "limit": 4, "seconds": 3600.0, "out": folder / "out"}
    defence = harden(model, images, labels, reporter=SILENT, **options)
    assert defence.layers == ("0",)
    assert defence(images[:3]).shape == (3, 2)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    again = load_defence(folder / "out", classifier=model)
    assert torch.equal(again(images[:3]), defence(images[:3]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.py:build"], "says nothing about its images"),
        (["model.py:hard", "--data", "images.npz"], "passes no gradient from its scores to its images"),
        (["model.py:build", "--data", "images.npz", "--time", "5"], "'5' is not allowed"),
        (["model.py:build", "--data", "images.npz", "--time", "1s"], "--time "),
        (["model.py:build", "--data", "images.npz", "--condition", "layers"], "no convolution"),
        (["model.py:build", "--data", "images.npz", "--eps", "8"], "--eps: "),
        (["model.py:build", "--data", "images.npz", "--resize", "20"], "squares of 28 to 96"),
        (["model.py:build", "--data", "images.npz", "--resume"], "nothing to resume"),
    ],
)
def test_what_cannot_be_carried_out(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(plan, "seconds_per_image", lambda *_: 1.0)
    assert carso(["harden", *arguments]) in (2, 3, 5)
    told = capsys.readouterr().err
    assert said in told
    assert "bug in carso" not in told
    assert not (folder / "runs").exists()


def test_the_plan_fills_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "seconds_per_image", lambda *_: 0.01 / 1.25)
    recipe = recipe_of(image_set(100))
    classifier = nn.Conv2d(3, 2, 3)
    found = plan.make_plan(recipe, classifier, count=100, seconds=80.0, start=Path("start"))
    # A second per epoch of either kind: a quarter of 80 s for the first purifier.
    assert found.limit == 100
    assert (found.start.training.epochs, found.final.training.epochs) == (20, 60)
    # Time for four epochs of each only with fewer images: 20 images of the ELBO in 0.8 s.
    short = plan.make_plan(recipe, classifier, count=100, seconds=6.4, start=Path("start"))
    assert short.limit == 40
    assert short.start.training.epochs == plan.FEWEST_EPOCHS
    # Some 60 steps, of 8 images each, against 750.
    assert short.warning.endswith("give more --time")
    assert not found.warning
    assert plan.Plan.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    with pytest.raises(UsageError, match="epochs of 32 images take about"):
        plan.make_plan(recipe, classifier, count=100, seconds=1.0, start=Path("start"))


def test_images_without_a_test_split_are_split_once() -> None:
    found = split_images(image_set(50), 0)
    assert len(found.test) == 10
    assert set(found.test.indices.tolist()).isdisjoint(found.train.indices.tolist())


def test_which_splits_a_source_has(tmp_path: Path) -> None:
    for split in ("both/train", "both/test", "one/train", "classes"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.png").write_bytes(b"")
    assert splits_of("digits") == ("train", "test")
    assert splits_of(str(tmp_path / "both")) == ("train", "test")
    assert splits_of(str(tmp_path / "one")) == ("train",)
    assert splits_of(str(tmp_path / "classes")) == ("test",)


def test_audits_get_the_larger_budget_that_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.purifier = nn.Module()
            self.purifier.mean = torch.zeros(1)

    monkeypatch.setattr(outcome, "seconds_of", lambda *_: 0.016)
    images = image_set(2000)
    sizes = [outcome.audit_size(Fast(), images, seconds, 0, {}) for seconds in (1e5, 200.0, 60.0, 0.0)]  # type: ignore[arg-type]
    assert sizes[0] == {"budget": "standard", "limit": 1000}
    assert sizes[1]["budget"] == "standard"
    assert 100 <= sizes[1]["limit"] < 1000
    assert sizes[2]["budget"] == "quick"
    assert sizes[3] == {"budget": "quick", "limit": 50}
    assert outcome.audit_size(Fast(), images, 0.0, 0, {"limit": 7, "budget": "full"}) == {  # type: ignore[arg-type]
        "budget": "full",
        "limit": 7,
    }


def test_a_function_of_probabilities_becomes_a_module_of_logits() -> None:
    images = image_set(4).images
    recipe = recipe_of(image_set())
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2))

    def probabilities(pixels: Tensor) -> Tensor:
        answer: Tensor = network(pixels).softmax(dim=1)
        return answer

    classifier = user_classifier(probabilities, recipe)
    expected = network(images).log_softmax(dim=1)
    torch.testing.assert_close(classifier(images), expected)
    # Its weights identify it: those of the network that the function refers to.
    assert sum(value.numel() for value in classifier.state_dict().values()) == 2 * (3 * 28 * 28 + 1)


def test_the_image_in_place_of_a_layer() -> None:
    images = image_set(4).images
    found = extract_representation(nn.Identity(), images, (IMAGE,))
    assert found[IMAGE] is images
    recipe = plan._trained(recipe_of(image_set()), 8, 4, None)
    purifier = build_purifier(recipe, nn.Identity()).eval()
    assert purifier.condition(found).shape == (4, 128)
    assert not torch.equal(purifier.condition(found)[0], purifier.condition(found)[1])


def test_the_average_is_that_of_its_definition() -> None:
    weight = torch.tensor([1.0], dtype=torch.float64)
    average = MovingAverage({"w": weight}, decay=0.5)
    # (1 + t) / (10 + t) is 2/11 at the first step and 3/12 at the second; from step 8 on, 0.5 is less.
    expected = 1.0
    for taken, value, decay in ((1, 3.0, 2 / 11), (2, 5.0, 3 / 12), (100, 9.0, 0.5)):
        weight.fill_(value)
        average.step(taken)
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.mean["w"], torch.tensor([expected], dtype=torch.float64))


def test_the_best_epoch_has_the_highest_mean() -> None:
    epochs = [
        {"defence_clean_accuracy": clean, "defence_attacked_accuracy": attacked}
        for clean, attacked in ((0.9, 0.1), (0.8, 0.6), (0.7, 0.7), (0.99, 0.2))
    ]
    assert best_epoch(epochs) == 2
    # Without held-out images all are alike, and the last is taken.
    assert best_epoch([{"defence_clean_accuracy": None}] * 3) == 2

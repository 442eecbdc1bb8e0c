"""The shipped classifiers are as good, and as robust, as their card says."""

from __future__ import annotations

import pytest
import torch

from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import build_classifier, load_images
from carso_cli.classifiers.registry import SHIPPED_FOLDER
from carso_cli.recipe.load import load_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "expected"), [("at", 348), ("clean", 349)])
def test_clean_accuracy_is_that_of_the_card(kind: str, expected: int) -> None:
    recipe = load_recipe("digits")
    test = load_images(recipe, "test")
    with torch.no_grad():
        predicted = build_classifier(recipe, kind)(test.pixels(slice(None))).argmax(dim=1)
    correct = int((predicted == test.labels).sum())
    # One image more or less where another processor rounds otherwise.
    assert abs(correct - expected) <= 1
    assert f"{expected}/{len(test)}" in (SHIPPED_FOLDER / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(("kind", "lowest", "highest"), [("at", 0.55, 0.8), ("clean", 0.0, 0.05)])
def test_robustness_is_about_that_of_the_card(kind: str, lowest: float, highest: float) -> None:
    recipe = load_recipe("digits")
    test = load_images(recipe, "test", limit=100)
    classifier = build_classifier(recipe, kind)
    attack = PGD(ThreatModel("linf", 0.1), steps=20, step_size=0.0125)
    perturbed = attack(classifier, test.pixels(slice(None)), test.labels)
    with torch.no_grad():
        accuracy = (classifier(perturbed).argmax(dim=1) == test.labels).float().mean()
    assert lowest <= accuracy <= highest

"""Against foolbox, a library of other authors: what it finds, ours must find too.

Same images and budget, on a trained classifier whose robust accuracy lies well between 0 and 1.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat import ThreatModel
from carso_cli.build import build_classifier, load_images
from carso_cli.recipe.load import load_recipe

RECIPE = load_recipe("digits")
STEPS = 20


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return build_classifier(RECIPE, "at")


@pytest.fixture(scope="module")
def images_and_labels() -> tuple[Tensor, Tensor]:
    images = load_images(RECIPE, "test", limit=40)
    return images.pixels(slice(0, len(images))), images.labels


def fooled_by_foolbox(model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float) -> Tensor:
    """Return (B,) bool: foolbox's projected gradient descent, two random starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a deprecated part of scipy
        import foolbox

    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(steps=STEPS, rel_stepsize=2.5 / STEPS)
    wrapped = foolbox.models.PyTorchModel(model.eval(), bounds=(0, 1))
    found = torch.zeros(len(images), dtype=torch.bool)
    for _ in range(2):
        _, _, fooled = attack(wrapped, images, labels, epsilons=eps)
        found |= fooled.raw if hasattr(fooled, "raw") else fooled
    return found


def fooled_by_ours(classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel) -> Tensor:
    """Return (B,) bool: Auto-PGD on cross-entropy and on DLR."""
    found = torch.zeros(len(images), dtype=torch.bool)
    for loss in ("ce", "dlr"):
        perturbed = APGD(threat, loss=loss, steps=STEPS, seed=0)(ClassifierTarget(classifier), images, labels)
        assert threat.contains(perturbed, images).all()
        with torch.no_grad():
            found |= classifier(perturbed).argmax(1) != labels
    return found


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("linf", 0.05), ("l2", 1.5)])
def test_foolbox_finds_no_more_on_a_classifier(
    classifier: nn.Module, images_and_labels: tuple[Tensor, Tensor], norm: str, eps: float
) -> None:
    images, labels = images_and_labels
    theirs = fooled_by_foolbox(classifier, images, labels, norm, eps)
    threat = ThreatModel("linf" if norm == "linf" else "l2", eps)
    ours = fooled_by_ours(classifier, images, labels, threat)
    assert 0.05 < ours.float().mean() < 0.95, "the comparison says nothing at this budget"
    assert theirs.sum() - ours.sum() <= 0.01 * len(labels)

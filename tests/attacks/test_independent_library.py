"""Against foolbox, a library of other authors: what it finds, ours must find too.

Same images and budget, on a trained classifier whose robust accuracy lies well between 0 and 1.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.rand_autoattack import RandAutoAttack
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import build_classifier, load_defence, load_images
from carso_cli.defence.defended_model import Defence
from carso_cli.evaluation.scoring import REPORT, SELECTION, DefenceScorer
from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.seed import generator

RECIPE = load_recipe("digits")
STEPS = 20


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return build_classifier(RECIPE, "at")


@pytest.fixture(scope="module")
def images_and_labels() -> tuple[Tensor, Tensor]:
    images = load_images(RECIPE, "test", limit=40)
    return images.pixels(slice(0, len(images))), images.labels


def import_foolbox() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a deprecated part of scipy
        import foolbox
    return foolbox


def fooled_by_foolbox(model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float) -> Tensor:
    """Return (B,) bool: foolbox's projected gradient descent, two random starts."""
    foolbox = import_foolbox()
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


@pytest.mark.slow
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


EPS, DEFENCE_STEPS, EOT_SAMPLES = 0.1, 10, 4


@pytest.fixture(scope="module")
def defence(stored_run: Path) -> Defence:
    """A defence of two samples: right on most clean images, half broken under attack."""
    trained = load_defence(stored_run, device="cpu")
    trained.n_samples = 2
    return trained


def examples_by_foolbox(defence: Defence, images: Tensor, labels: Tensor) -> Tensor:
    """Return (B, channels, H, W): foolbox's projected gradient descent through its own EoT wrapper."""
    foolbox = import_foolbox()

    class ExactView(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = defence(inputs, view="exact")
            return logits

    wrapped = foolbox.models.PyTorchModel(ExactView().eval(), bounds=(0, 1))
    averaged = foolbox.models.ExpectationOverTransformationWrapper(wrapped, n_steps=EOT_SAMPLES)
    attack = foolbox.attacks.LinfPGD(steps=DEFENCE_STEPS, rel_stepsize=0.25)
    perturbed: Tensor = attack(averaged, images, labels, epsilons=EPS)[1]
    return perturbed


def examples_by_ours(defence: Defence, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the examples of the adaptive protocol's white-box attacks on the exact view."""
    threat = ThreatModel("linf", EPS)
    target = DefenceTarget(defence, "exact", 4096, generator(0, "latents"))
    budget: Any = {"steps": DEFENCE_STEPS, "eot_samples": EOT_SAMPLES}
    ascent, ascent_from_random = (
        PGDEoT(threat, **budget, step_size=EPS / 4, random_start=random_start)
        for random_start in (False, True)
    )
    rand_aa = RandAutoAttack(threat, **budget)
    return [
        ascent(target, images, labels),
        ascent_from_random(target, images, labels),
        *rand_aa.candidates(target, images, labels).values(),
    ]


@pytest.mark.slow
def test_foolbox_finds_no_more_on_a_defence(
    defence: Defence, images_and_labels: tuple[Tensor, Tensor]
) -> None:
    images, labels = (part[:12] for part in images_and_labels)
    scorer, indices = DefenceScorer(defence, 0, 20, 4096), range(len(labels))

    def accuracies(examples: Tensor, draw_set: str) -> Tensor:
        return scorer(examples, labels, indices, draw_set).correct / scorer.draws

    ours = examples_by_ours(defence, images, labels)
    worst = torch.stack([accuracies(examples, SELECTION) for examples in ours]).argmin(dim=0)
    # Scored on other draws than those that chose it.
    robust = accuracies(torch.stack(ours)[worst, torch.arange(len(labels))], REPORT).mean()
    theirs = accuracies(examples_by_foolbox(defence, images, labels), REPORT).mean()
    assert accuracies(images, REPORT).mean() > 0.8
    assert 0.05 < robust < 0.7, "the comparison says nothing of this defence"
    # One point, and two for the few images and draws.
    assert robust - theirs <= 0.03

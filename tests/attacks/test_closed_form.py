"""Every gradient attack reaches the exact worst case of a linear model, and no attack exceeds it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.attack import Attack
from carso_cli.attacks.autoattack import LibraryAPGD
from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.target import ClassifierTarget, LossGradient
from carso_cli.attacks.threat_model import ThreatModel

NORMS = ["linf", "l2"]
EPS = {"linf": 0.02, "l2": 0.08}
STEP = {"linf": 0.005, "l2": 0.02}

GRADIENT_ATTACKS: dict[str, Callable[[ThreatModel], Attack]] = {
    "fgsm": FGSM,
    "pgd": lambda threat: PGD(threat, steps=40, step_size=STEP[threat.norm]),
    "pgd-best": lambda threat: PGD(threat, steps=40, step_size=STEP[threat.norm], keep_best=True),
    "pgd-eot": lambda threat: PGDEoT(threat, steps=40, eot_samples=1, step_size=STEP[threat.norm]),
    "pgd-eot-random-start": lambda threat: PGDEoT(
        threat, steps=60, eot_samples=1, step_size=STEP[threat.norm], random_start=True, restarts=2
    ),
    "apgd-ce": lambda threat: APGD(threat, loss="ce", steps=40),
    "library-apgd-ce": lambda threat: LibraryAPGD(threat, loss="ce", steps=40),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_the_worst_case_is_reached(name: str, norm: str, problem: Any) -> None:
    threat = ThreatModel(norm, EPS[norm])
    found = problem.found_by(GRADIENT_ATTACKS[name](threat))
    assert threat.contains(found, problem.images, tolerance=1e-6).all()
    torch.testing.assert_close(
        problem.margin(found), problem.worst_margin(norm, EPS[norm]), rtol=0, atol=1e-4
    )
    # For two classes the loss itself is known too: softplus of the margin.
    if problem.weights.shape[0] == 2:
        loss = F.cross_entropy(problem(found), problem.labels, reduction="none")
        torch.testing.assert_close(loss, F.softplus(problem.worst_margin(norm, EPS[norm])), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_each_image_gets_its_own_radius(name: str, norm: str, three_classes: Any) -> None:
    problem = three_classes
    radii = torch.linspace(0.1, 1.0, len(problem.images)) * EPS[norm]
    threat = ThreatModel(norm, radii)
    found = problem.found_by(GRADIENT_ATTACKS[name](threat))
    torch.testing.assert_close(threat.distance(found, problem.images), radii, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(problem.margin(found), problem.worst_margin(norm, radii), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_the_worst_case_is_reached_where_the_pixel_range_binds(name: str, three_classes: Any) -> None:
    problem = three_classes
    threat = ThreatModel("linf", 0.6)
    attack = GRADIENT_ATTACKS[name](threat)
    if name.startswith("pgd"):
        attack = PGDEoT(threat, steps=40, eot_samples=1, step_size=0.1, random_start="random" in name)
        if name == "pgd":
            attack = PGD(threat, steps=40, step_size=0.1)
    found = problem.found_by(attack)
    assert 0 <= found.min() <= found.max() <= 1
    assert ((found == 0) | (found == 1)).float().mean() > 0.5, "the range must bind for this to test anything"
    torch.testing.assert_close(problem.margin(found), problem.worst_margin_in_box(0.6), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_cross_entropy_of_any_linear_model_reaches_the_best_vertex(name: str) -> None:
    """Cross-entropy is convex in the image, so its maximum over the linf ball is at one of 256 vertices."""
    weights = torch.randn(4, 8)
    images = 0.3 + 0.4 * torch.rand(6, 1, 2, 4)
    labels = (images.flatten(1) @ weights.T).argmax(dim=1)
    vertices = 0.02 * torch.tensor(list(product((-1.0, 1.0), repeat=8))).view(-1, 1, 1, 2, 4)
    logits = (images + vertices).flatten(2) @ weights.T
    every_loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(256), reduction="none").view(256, -1)

    def model(points: Tensor) -> Tensor:
        return points.flatten(1) @ weights.T

    found = GRADIENT_ATTACKS[name](ThreatModel("linf", 0.02))(ClassifierTarget(model), images, labels)
    loss = F.cross_entropy(model(found), labels, reduction="none")
    torch.testing.assert_close(loss, every_loss.amax(dim=0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("library", [False, True], ids=["ours", "library"])
def test_dlr_reaches_the_worst_case_and_crosses_the_boundary_iff_it_can(
    library: bool, norm: str, three_classes: Any
) -> None:
    problem = three_classes
    kind: Any = LibraryAPGD if library else APGD
    found = problem.found_by(kind(ThreatModel(norm, EPS[norm]), loss="dlr", steps=60))
    worst = problem.worst_margin(norm, EPS[norm])
    # Beyond the boundary DLR is constant once the label is third, so only short of it is the margin maximal.
    short = worst < 0
    assert short.any()
    torch.testing.assert_close(problem.margin(found)[short], worst[short], rtol=0, atol=1e-4)
    for factor in (0.98, 1.02):
        threat = ThreatModel(norm, factor * problem.distance(norm))
        found = problem.found_by(kind(threat, loss="dlr", steps=60))
        fooled = problem(found).argmax(dim=1) != problem.labels
        assert bool((fooled == (factor > 1)).all())


class FlippedTarget(ClassifierTarget):
    """The fault that a library once shipped: the gradient of the negative loss."""

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Any, eot_samples: int) -> LossGradient:
        answer = super().loss_and_gradient(images, labels, loss, eot_samples)
        return LossGradient(answer.loss, answer.correct, answer.saturated, -answer.gradient)


@pytest.mark.parametrize("name", ["pgd-eot", "apgd-ce"])
def test_these_tests_would_catch_a_flipped_sign(name: str, problem: Any) -> None:
    found = GRADIENT_ATTACKS[name](ThreatModel("linf", 0.02))(
        FlippedTarget(problem), problem.images, problem.labels
    )
    assert (problem.worst_margin("linf", 0.02) - problem.margin(found)).min() > 0.01

"""Multi-target Auto-PGD: a linear model's exact worst case, at any scale, never a loss to its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.gradient_sources import OUTPUT, GradientSource
from carso_cli.attacks.losses import margin
from carso_cli.attacks.model_parts import Model
from carso_cli.attacks.source_target import SourceTarget
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.targeted_apgd import TargetedAPGD
from carso_cli.attacks.threat_model import ThreatModel

EPS = {"linf": 0.02, "l2": 0.08}


def target_of(model: Model, *, stochastic: bool = False) -> SourceTarget:
    return SourceTarget(GradientSource(OUTPUT, OUTPUT, 1.0, model), stochastic=stochastic, seed=0)


def attack(norm: str = "linf", **options: Any) -> TargetedAPGD:
    return TargetedAPGD(ThreatModel(norm, EPS[norm]), **{"steps": 30, **options})


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_worst_case_is_reached(norm: str, problem: Any) -> None:
    found = attack(norm)(ClassifierTarget(problem), problem.images, problem.labels)
    assert ThreatModel(norm, EPS[norm]).contains(found, problem.images, tolerance=1e-6).all()
    worst = problem.worst_margin(norm, EPS[norm])
    # An image that is wrong leaves the queue, with an example that need not be the worst.
    right = problem.margin(found) <= 0
    assert right.any()
    torch.testing.assert_close(problem.margin(found)[right], worst[right], rtol=0, atol=1e-4)
    assert torch.equal(right, worst <= 0)


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_the_scale_of_the_scores_changes_no_decision(three_classes: Any, factor: float) -> None:
    images, labels = three_classes.images, three_classes.labels
    plain = attack()(target_of(three_classes), images, labels)
    scaled = attack()(target_of(lambda x: factor * three_classes(x)), images, labels)
    torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-5)


def test_the_class_that_pays_is_found_although_another_leads() -> None:
    """Class 1 is close and cannot be reached; class 2 starts far behind and wins."""
    weights = torch.zeros(3, 16)
    weights[2] = 10.0
    bias = torch.tensor([1.0, 0.9, 1.0 - 10.0 * 16 * 0.5 - 2.0])

    def model(images: Tensor) -> Tensor:
        return images.flatten(1) @ weights.T + bias

    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    # The lead of 2 falls by 10 x 16 x 0.02 = 3.2.
    found = attack()(ClassifierTarget(model), images, labels)
    assert (model(found).argmax(dim=1) == 2).all()
    one = attack(targets=1)(ClassifierTarget(model), images, labels)
    assert (model(one).argmax(dim=1) == 0).all()


def test_it_never_loses_to_its_start_on_a_rugged_model(three_classes: Any) -> None:
    def rugged(images: Tensor) -> Tensor:
        scores: Tensor = three_classes(images) + torch.sin(300 * images.flatten(1)[:, :3])
        return scores

    images, labels = three_classes.images, three_classes.labels
    found = attack(steps=3)(ClassifierTarget(rugged), images, labels)
    assert (margin(rugged(found), labels) >= margin(rugged(images), labels)).all()


def test_images_that_are_wrong_already_are_left_as_they_are(three_classes: Any) -> None:
    wrong = (three_classes.labels + 1) % 3
    found = attack()(ClassifierTarget(three_classes), three_classes.images, wrong)
    assert torch.equal(found, three_classes.images)


def test_a_random_model_is_attacked_in_the_mean(three_classes: Any) -> None:
    def noisy(images: Tensor) -> Tensor:
        scores: Tensor = three_classes(images + 0.02 * torch.randn_like(images))
        return scores

    images, labels = three_classes.images, three_classes.labels
    found, again = (
        attack(eot_samples=4)(target_of(noisy, stochastic=True), images, labels) for _ in range(2)
    )
    assert torch.equal(found, again)
    worst = three_classes.worst_margin("linf", EPS["linf"])
    hard = worst < -0.5
    assert (three_classes.margin(found)[hard] >= worst[hard] - 0.1).all()
    assert (three_classes.margin(found) > three_classes.margin(images)).all()

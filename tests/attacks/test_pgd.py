"""FGSM and PGD as training and evaluation use them, and PGD with Expectation over Transformation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.attack import BestPoint, require_finite
from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import NumericsError

NORMS = ["linf", "l2"]


def test_fgsm_is_one_signed_step(digits: Any) -> None:
    model, images, labels = digits
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
    expected = (images + 0.07 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(ThreatModel("linf", 0.07))(model, images, labels), expected)


def test_fgsm_under_l2_steps_along_the_gradient(digits: Any) -> None:
    model, images, labels = digits
    inside = 0.3 + 0.4 * images
    leaf = inside.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(1e3 * F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    usable = gradient.flatten(1).norm(dim=1) > 1
    step = 0.05 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    found = FGSM(ThreatModel("l2", 0.05))(model, inside, labels)
    torch.testing.assert_close((found - inside)[usable], step[usable], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_steps_are_of_full_size_where_the_gradient_is_faint(norm: str, digits: Any) -> None:
    model, images, labels = digits

    def confident(points: Tensor) -> Tensor:
        logits: Tensor = 1e-9 * model(points)
        return logits

    inside, threat = 0.3 + 0.4 * images, ThreatModel(norm, 0.05)
    one_step = PGD(threat, steps=1, step_size=0.05, random_start=False)
    for attack in (FGSM(threat), one_step):
        moved = threat.distance(attack(confident, inside, labels), inside)
        torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-4, atol=0)


def test_pgd_follows_its_definition_step_by_step(digits: Any) -> None:
    model, images, labels = digits
    current = images
    for _ in range(6):
        leaf = current.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
        current = torch.clamp(current + 0.03 * gradient.sign(), images - 0.1, images + 0.1).clamp(0, 1)
    attack = PGD(ThreatModel("linf", 0.1), steps=6, step_size=0.03, random_start=False)
    torch.testing.assert_close(attack(model, images, labels), current)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_repeats_from_its_seed_and_leaves_the_global_state_alone(norm: str, digits: Any) -> None:
    model, images, labels = digits
    threat = ThreatModel(norm, 0.1)
    before = torch.random.get_rng_state()
    first = PGD(threat, steps=1, step_size=0.001, seed=1)(model, images, labels)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    again = PGD(threat, steps=1, step_size=0.001, seed=1)(model, images, labels)
    other = PGD(threat, steps=1, step_size=0.001, seed=2)(model, images, labels)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().mean() > 0.001


@pytest.mark.parametrize("norm", NORMS)
def test_a_training_batch_with_one_radius_per_image_and_trainable_parameters(norm: str, digits: Any) -> None:
    _, images, labels = digits
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    radii = torch.linspace(0.0, 0.2, len(images))
    threat = ThreatModel(norm, radii)
    for attack in (FGSM(threat), PGD(threat, steps=4, step_size=radii / 2, random_start=True, seed=0)):
        found = attack(network, images, labels)
        assert threat.contains(found, images, tolerance=1e-6).all()
        torch.testing.assert_close(found[0], images[0], atol=1e-6, rtol=0)
        assert not found.requires_grad
        loss = F.cross_entropy(network(found), labels, reduction="none")
        assert (loss > F.cross_entropy(network(images), labels, reduction="none"))[1:].all()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_keeping_the_best_point_never_loses_to_the_start_or_to_the_last_point(wave: Any) -> None:
    rugged = wave(40)
    images = torch.rand(30, 1, 3, 3)
    labels = torch.zeros(30, dtype=torch.long)
    threat = ThreatModel("linf", 0.1)

    def loss(points: Tensor) -> Tensor:
        return F.cross_entropy(rugged(points), labels, reduction="none")

    kept = PGD(threat, steps=9, step_size=0.05, random_start=False, keep_best=True)(rugged, images, labels)
    last = PGD(threat, steps=9, step_size=0.05, random_start=False)(rugged, images, labels)
    assert (loss(last) < loss(images)).any(), "the model must be rugged enough to lose"
    assert (loss(kept) >= torch.maximum(loss(last), loss(images)) - 1e-5).all()
    averaged = PGDEoT(threat, steps=9, eot_samples=1, step_size=0.05)(
        ClassifierTarget(rugged), images, labels
    )
    torch.testing.assert_close(loss(averaged), loss(kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_eot_beats_a_random_defence_that_noise_does_not(
    norm: str, random_start: bool, attacked: Any, images: Tensor, labels: Tensor
) -> None:
    threat = ThreatModel(norm, {"linf": 0.3, "l2": 1.2}[norm])
    attack = PGDEoT(
        threat,
        steps=15,
        eot_samples=6,
        step_size=0.2 * float(threat.eps),
        random_start=random_start,
        restarts=2,
        seed=1,
    )
    found = attack(attacked(samples_per_pass=30), images, labels)
    assert threat.contains(found, images).all()
    torch.testing.assert_close(attack(attacked(samples_per_pass=30), images, labels), found, rtol=0, atol=0)
    judge = attacked(seed=9)
    clean = judge.expected_loss(images, labels, cross_entropy, 200)
    noise = judge.expected_loss(threat.random_start(images, judge.generator), labels, cross_entropy, 200)
    after = judge.expected_loss(found, labels, cross_entropy, 200)
    assert after.correct.mean() < 0.25 < 0.55 < min(clean.correct.mean(), noise.correct.mean())
    assert (after.loss > torch.maximum(clean.loss, noise.loss)).all()


def test_the_point_after_the_last_step_counts() -> None:
    def model(images: Tensor) -> Tensor:
        return torch.stack([images.flatten(1).sum(dim=1), torch.zeros(len(images))], dim=1)

    images = torch.full((2, 1, 2, 2), 0.5)
    labels = torch.zeros(2, dtype=torch.long)
    threat = ThreatModel("linf", 0.1)
    for attack in (
        PGDEoT(threat, steps=1, eot_samples=1, step_size=0.1),
        PGD(threat, steps=1, step_size=0.1, random_start=False, keep_best=True),
    ):
        torch.testing.assert_close(attack(ClassifierTarget(model), images, labels), images - 0.1)


@pytest.mark.parametrize("norm", NORMS)
def test_pixels_whose_gradient_is_nan_stay_where_they_are(norm: str) -> None:
    def half_broken(images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        broken, whole = pixels[:, :2], pixels[:, 2:]
        nan_slope = (broken - broken.detach()).abs().sqrt().sum(dim=1)
        return torch.stack([whole.sum(dim=1) + nan_slope, torch.zeros(len(images))], dim=1)

    images = torch.full((1, 1, 2, 2), 0.5)
    labels = torch.zeros(1, dtype=torch.long)
    threat = ThreatModel(norm, 0.1)
    target = ClassifierTarget(half_broken)
    assert target.loss_and_gradient(images, labels, cross_entropy, 1).gradient.isnan().sum() == 2
    for attack in (
        PGD(threat, steps=3, step_size=0.1, random_start=False),
        FGSM(threat),
        PGDEoT(threat, steps=3, eot_samples=1, step_size=0.1),
    ):
        change = (attack(target, images, labels) - images).flatten()
        assert change[:2].abs().max() == 0
        assert change[2:].max() < -0.05


def test_a_wrong_answer_with_a_nan_loss_is_kept() -> None:
    """Saturated logits: the loss is finite nowhere but in the middle, where the label still wins."""

    def saturated(images: Tensor) -> Tensor:
        lead = 1e3 * (images.flatten(1).mean(dim=1) - 0.5) + 1.0
        capped = torch.where(lead.abs() > 20, lead.sign() * torch.inf, lead)
        return torch.stack([capped, -capped], dim=1)

    images = torch.full((1, 1, 2, 2), 0.5)
    labels = torch.zeros(1, dtype=torch.long)
    threat = ThreatModel("linf", 0.1)
    assert F.cross_entropy(saturated(images), labels).isfinite()
    for attack in (
        PGDEoT(threat, steps=2, eot_samples=1, step_size=0.1),
        PGD(threat, steps=2, step_size=0.1, random_start=False, keep_best=True),
    ):
        found = attack(ClassifierTarget(saturated), images, labels)
        assert saturated(found).argmax(dim=1) == 1
        assert F.cross_entropy(saturated(found), labels).isnan()


def test_best_point_ignores_nan_in_either_place() -> None:
    best = BestPoint(torch.zeros(3, 1))
    better = best.offer(torch.ones(3, 1), torch.tensor([torch.nan, 1.0, -torch.inf]))
    assert better.tolist() == [False, True, False]
    best.offer(torch.full((3, 1), 2.0), torch.tensor([-5.0, torch.nan, torch.nan]))
    assert best.images[:, 0].tolist() == [2, 1, 0]


def test_pixels_that_are_not_finite_stop_the_run() -> None:
    with pytest.raises(NumericsError, match="'pgd' produced pixels"):
        require_finite(torch.tensor([torch.nan]), "pgd")

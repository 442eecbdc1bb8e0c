"""Any model as a target: one scale of scores, and gradients averaged over fresh draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.gradient_sources import OUTPUT, GradientSource
from carso_cli.attacks.losses import cross_entropy, margin
from carso_cli.attacks.model_parts import Model
from carso_cli.attacks.source_target import SourceTarget
from carso_cli.attacks.target import AttackTarget


def target_of(model: Model, *, stochastic: bool = False, seed: int = 0) -> SourceTarget:
    return SourceTarget(GradientSource(OUTPUT, OUTPUT, 1.0, model), stochastic=stochastic, seed=seed)


class Shifted:
    """Logits W (x + z) with z a normal draw for each image and pixel."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return (images + 0.3 * torch.randn_like(images)).flatten(1) @ self.weights.T


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_the_scale_of_the_scores_changes_nothing(three_classes: Any, factor: float) -> None:
    images, labels = three_classes.images, three_classes.labels
    plain, scaled = target_of(three_classes), target_of(lambda x: factor * three_classes(x))
    assert isinstance(scaled, AttackTarget)
    torch.testing.assert_close(plain(images), scaled(images), rtol=1e-4, atol=1e-5)
    for loss in (cross_entropy, margin):
        first = plain.loss_and_gradient(images, labels, loss, 1)
        second = scaled.loss_and_gradient(images, labels, loss, 1)
        torch.testing.assert_close(first.loss, second.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first.gradient, second.gradient, rtol=1e-3, atol=1e-5)


def test_scaling_decides_nothing_and_equal_scores_stay(three_classes: Any) -> None:
    images = three_classes.images
    assert torch.equal(target_of(three_classes)(images).argmax(dim=1), three_classes(images).argmax(dim=1))
    constant = target_of(lambda x: 0 * three_classes(x))
    assert constant(images).abs().max() == 0


def test_a_deterministic_model_is_asked_once(three_classes: Any) -> None:
    calls = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        scores: Tensor = three_classes(images)
        return scores

    target = target_of(counted)
    target.expected_loss(three_classes.images, three_classes.labels, margin, 7)
    target.loss_and_gradient(three_classes.images, three_classes.labels, margin, 7)
    assert len(calls) == 2


def test_draws_are_fresh_and_repeat_with_the_seed() -> None:
    model = Shifted(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    images = torch.full((2, 1, 4, 4), 0.5)
    first, again, other = (target_of(model, stochastic=True, seed=seed) for seed in (0, 0, 1))
    one, two = first(images), first(images)
    assert not torch.equal(one, two)
    assert torch.equal(one, again(images))
    assert torch.equal(two, again(images))
    assert not torch.equal(one, other(images))
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    first(images)
    assert torch.equal(torch.rand(()), expected)


def test_the_averaged_gradient_is_the_analytic_one() -> None:
    """The margin of two classes has one gradient, w_1 - w_0, up to the scale of each draw's scores."""
    weights = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    model = Shifted(weights)
    images, labels = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.long)
    found = target_of(model, stochastic=True).loss_and_gradient(images, labels, margin, 20)
    assert model.calls == 20
    direction = (weights[1] - weights[0]).expand(3, -1)
    assert F.cosine_similarity(found.gradient.flatten(1), direction).min() > 0.99


def test_the_expected_share_of_right_answers_is_that_of_the_draws() -> None:
    """One pixel decides: its noise of 0.3 leaves a lead of 0.1 right with probability 0.631."""
    weights = torch.zeros(2, 16)
    weights[0, 0] = 1.0
    images, labels = torch.full((200, 1, 4, 4), 0.1), torch.zeros(200, dtype=torch.long)
    found = target_of(Shifted(weights), stochastic=True).expected_loss(images, labels, margin, 50)
    assert found.correct.mean() == pytest.approx(0.6306, abs=0.02)


def test_the_vjp_is_that_of_the_scores(three_classes: Any) -> None:
    images = three_classes.images
    target = target_of(three_classes)
    scores, vjp = target.vjp(images)
    torch.testing.assert_close(scores, target(images))
    cotangent = torch.zeros_like(scores)
    cotangent[:, 0] = 1.0
    spread = three_classes(images).std(dim=1).median()
    expected = (3.0 / spread * three_classes.weights[0]).expand(len(images), -1)
    torch.testing.assert_close(vjp(cotangent).flatten(1), expected, rtol=1e-4, atol=1e-5)

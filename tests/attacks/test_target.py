"""Gradients of a random defence: exact, chunked, and right on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import cross_entropy, margin
from carso_cli.attacks.target import ClassifierTarget, ExpectedLoss, as_target
from carso_cli.errors import UsageError
from carso_cli.runtime.seed import generator

DRAWS = 7


def independent_passes(toy: Any, images: Tensor, labels: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient as the mean of K whole passes, one per draw; latents (K, B, N, Z)."""
    losses, gradients = [], []
    for draw in latents:
        leaf = images.clone().requires_grad_()
        logits = toy.aggregate(toy.sample_logits(toy.condition(leaf), draw), "exact")
        values = F.cross_entropy(logits, labels, reduction="none")
        gradients.append(torch.autograd.grad(values.sum(), leaf)[0])
        losses.append(values.detach())
    return torch.stack(losses).mean(0), torch.stack(gradients).mean(0)


@pytest.mark.parametrize("samples_per_pass", [3, 4, 10, 4096])
def test_gradient_is_the_mean_of_independent_passes(
    toy: Any, attacked: Any, images: Tensor, labels: Tensor, samples_per_pass: int
) -> None:
    latents = toy.draw_latents(DRAWS * len(images), generator=generator(0, "latents"))
    loss, gradient = independent_passes(toy, images, labels, latents.unflatten(0, (DRAWS, -1)))
    answer = attacked(samples_per_pass=samples_per_pass).loss_and_gradient(
        images, labels, cross_entropy, DRAWS
    )
    torch.testing.assert_close(answer.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answer.gradient, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("samples_per_pass", [3, 5, 12, 104])
def test_no_pass_exceeds_the_bound_and_the_condition_runs_once(
    toy: Any, attacked: Any, images: Tensor, labels: Tensor, samples_per_pass: int
) -> None:
    target = attacked(samples_per_pass=samples_per_pass)
    for ask in (target.loss_and_gradient, target.expected_loss):
        toy.passes.clear()
        toy.conditions = 0
        ask(images, labels, cross_entropy, DRAWS)
        assert max(toy.passes) <= samples_per_pass
        assert sum(toy.passes) == DRAWS * len(images) * toy.n_samples
        assert toy.conditions == 1
    toy.passes.clear()
    target(images)
    logits, back = target.vjp(images)
    back(torch.ones_like(logits))
    assert max(toy.passes) <= samples_per_pass


def test_gradient_approaches_the_analytic_expectation() -> None:
    """Of (W + z E) x with z ~ N(0, 1) and a margin loss, the expected gradient is w_1 - w_0, whatever E."""
    defence = RandomLinear(noise=3.0)
    images = torch.rand(3, 1, 4, 4)
    labels = torch.zeros(3, dtype=torch.long)
    target = DefenceTarget(defence, "exact", 4096, generator(0))
    gradient = target.loss_and_gradient(images, labels, margin, 40_000).gradient.flatten(1)
    expected = (defence.weights[1] - defence.weights[0]).expand(3, -1)
    assert torch.cosine_similarity(gradient, expected, dim=1).min() > 0.99
    torch.testing.assert_close(gradient.norm(dim=1), expected.norm(dim=1), rtol=0.02, atol=0.0)
    one_draw = target.loss_and_gradient(images, labels, margin, 1).gradient.flatten(1)
    assert torch.cosine_similarity(one_draw, expected, dim=1).min() < 0.9, (
        "the toy must be random to test EoT"
    )


def test_gradient_of_cross_entropy_agrees_with_quadrature() -> None:
    """The mean over draws is taken of the loss, not of the logits: checked against an integral over z."""
    defence = RandomLinear(noise=1.5)
    images = torch.rand(2, 1, 4, 4)
    labels = torch.zeros(2, dtype=torch.long)
    target = DefenceTarget(defence, "exact", 100_000, generator(0))
    answer = target.loss_and_gradient(images, labels, cross_entropy, 400_000)
    nodes = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(nodes**2) / 2)
    density /= density.sum()
    slope = (defence.weights[1] - defence.weights[0]).double()
    wobble = (defence.perturbation[1] - defence.perturbation[0]).double()
    for image, loss, gradient in zip(images, answer.loss, answer.gradient, strict=True):
        per_node = slope + nodes[:, None] * wobble
        lead = per_node @ image.flatten().double()
        expected = (density[:, None] * torch.sigmoid(lead)[:, None] * per_node).sum(0)
        assert float(loss) == pytest.approx(float((density * F.softplus(lead)).sum()), rel=0.02)
        assert torch.cosine_similarity(gradient.flatten().double(), expected, dim=0) > 0.99
        assert float(gradient.norm()) == pytest.approx(float(expected.norm()), rel=0.02)


class RandomLinear:
    """A defence with logits (W + z E) x: one sample, one latent, two classes."""

    n_samples = 1

    def __init__(self, noise: float = 1.0) -> None:
        source = generator(5)
        self.weights = torch.randn(2, 16, generator=source)
        self.perturbation = noise * torch.randn(2, 16, generator=source)

    def classifier(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.T

    second_classifier = classifier

    def condition(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def draw_latents(
        self, batch: int, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.randn(batch, n_samples or 1, 1, generator=generator)

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        return (condition @ self.weights.T)[:, None] + latents * (condition @ self.perturbation.T)[:, None]

    def aggregate(self, sample_logits: Tensor, view: str = "exact") -> Tensor:
        return sample_logits.mean(dim=1)


def test_expected_loss_agrees_with_the_gradient_pass(attacked: Any, images: Tensor, labels: Tensor) -> None:
    quick = attacked(samples_per_pass=6).expected_loss(images, labels, margin, DRAWS)
    full = attacked().loss_and_gradient(images, labels, margin, DRAWS)
    torch.testing.assert_close(quick.loss, full.loss)
    torch.testing.assert_close(quick.correct, full.correct)
    assert ((quick.correct > 0) & (quick.correct <= 1)).all()
    # The margin is positive exactly where the label is not the argmax.
    single = attacked().expected_loss(images, labels, margin, 1)
    torch.testing.assert_close(single.correct, (single.loss < 0).float())


def test_targets_repeat_from_a_seed_and_never_share_latents_between_steps(
    attacked: Any, images: Tensor, labels: Tensor
) -> None:
    first, second = attacked(seed=1), attacked(seed=1)
    for _ in range(3):
        torch.testing.assert_close(first(images), second(images), rtol=0, atol=0)
    steps = [first.loss_and_gradient(images, labels, cross_entropy, 2).gradient for _ in range(2)]
    assert not torch.equal(*steps)
    assert not torch.equal(first(images), attacked(seed=2)(images))


@pytest.mark.parametrize("samples_per_pass", [4, 4096])
def test_the_vjp_is_the_gradient_of_one_draw_and_can_be_repeated(
    toy: Any, attacked: Any, images: Tensor, labels: Tensor, samples_per_pass: int
) -> None:
    target = attacked(samples_per_pass=samples_per_pass)
    logits, back = target.vjp(images)
    expected = attacked().loss_and_gradient(images, labels, cross_entropy, 1).gradient
    slope = logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
    for factor in (1.0, -2.0):
        torch.testing.assert_close(back(factor * slope), factor * expected, rtol=1e-4, atol=1e-6)
    assert toy.head.grad is None, "parameters must not collect gradients"


def test_frozen_latents_make_a_deterministic_target(attacked: Any, images: Tensor) -> None:
    target = attacked()
    fixed = target.frozen()
    assert target.stochastic
    assert not fixed.stochastic
    torch.testing.assert_close(fixed(images), fixed(images), rtol=0, atol=0)
    torch.testing.assert_close(fixed(images)[2:], fixed(images[2:]))
    assert not torch.equal(target(images), target(images))


def test_seen_as_changes_the_view_and_the_number_of_samples(toy: Any, attacked: Any, images: Tensor) -> None:
    target = attacked().seen_as(lambda sample_logits: sample_logits[:, 0], n_samples=1)
    latents = toy.draw_latents(len(images), 1, generator(0, "latents"))
    expected = toy.sample_logits(toy.condition(images), latents)[:, 0]
    torch.testing.assert_close(target(images), expected.detach())


def test_a_pass_must_hold_one_draw(attacked: Any) -> None:
    with pytest.raises(UsageError, match="samples_per_pass 2 is below the 3 samples"):
        attacked(samples_per_pass=2)


def test_classifier_target(digits: Any) -> None:
    model, images, labels = digits
    target = as_target(model)
    assert isinstance(target, ClassifierTarget)
    assert as_target(target) is target
    answer = target.loss_and_gradient(images, labels, cross_entropy, eot_samples=3)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    torch.testing.assert_close(answer.gradient, gradient)
    torch.testing.assert_close(answer.loss, F.cross_entropy(model(images), labels, reduction="none"))
    assert answer.correct.tolist() == (model(images).argmax(1) == labels).float().tolist()


def test_nan_losses_are_ordered_by_who_is_wrong() -> None:
    loss = torch.tensor([torch.nan, torch.nan, 1.0, torch.nan])
    answer = ExpectedLoss(loss, correct=torch.tensor([0.0, 1.0, 1.0, 0.5]), saturated=torch.zeros(4))
    assert answer.rank.tolist() == [torch.inf, -torch.inf, 1.0, -torch.inf]


def test_saturation_marks_labels_that_are_certain_in_float32() -> None:
    logits = torch.tensor([[30.0, 0.0], [10.0, 0.0], [0.0, 30.0], [torch.inf, 0.0], [torch.nan, 0.0]])
    answer = ExpectedLoss.of(torch.zeros(5), logits, torch.zeros(5, dtype=torch.long))
    assert answer.saturated.tolist() == [1, 0, 0, 1, 1]

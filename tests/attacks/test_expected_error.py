"""Ascent on the chance of error: the loss by hand, and the worst case of a noisy linear model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.expected_error import raise_expected, smooth_error, width_of
from carso_cli.attacks.gradient_sources import OUTPUT, GradientSource
from carso_cli.attacks.source_target import SourceTarget
from carso_cli.attacks.targeted_apgd import TargetedAPGD
from carso_cli.attacks.threat_model import ThreatModel


def test_the_loss_is_the_sigmoid_of_the_lead_over_the_label() -> None:
    logits, width = torch.tensor([[1.0, 3.0, 0.0], [2.0, 0.0, -1.0]]), torch.tensor(2.0)
    lead = torch.tensor([2.0, -2.0]) / 2
    untargeted = smooth_error(width)(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(untargeted, torch.sigmoid(lead) + 1e-3 * lead)
    lead = torch.tensor([-1.0, -3.0]) / 2
    towards_the_last = smooth_error(width)(logits, torch.tensor([[0, 2], [0, 2]]))
    torch.testing.assert_close(towards_the_last, torch.sigmoid(lead) + 1e-3 * lead)


def test_a_gradient_is_left_far_from_the_boundary() -> None:
    logits = torch.tensor([[1e4, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(
        smooth_error(torch.tensor(1.0))(logits, torch.tensor([0])).sum(), logits
    )
    torch.testing.assert_close(gradient, torch.tensor([[-1e-3, 1e-3]]))


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_the_width_follows_the_scale_of_the_logits(factor: float) -> None:
    logits = torch.randn(50, 10)
    torch.testing.assert_close(width_of(factor * logits), factor * width_of(logits))
    assert float(width_of(torch.zeros(4, 3))) == 1.0


class NoisyLinear:
    """Class 0 against 1 and 2, which gain by opposite pixels: towards either alone, the other loses.

    The lead of class 1 is a - b - 0.3 + noise, that of class 2 is b - a - 0.3 + c + noise, with a, b and c
    the means of three rows of pixels.
    """

    def __call__(self, images: Tensor) -> Tensor:
        a, b, c = images[:, 0, :3].mean(dim=2).unbind(dim=1)
        first, second = 0.4 * torch.randn(2, len(images))
        scores = torch.stack([torch.zeros_like(a), a - b - 0.3 + first, b - a - 0.3 + c + second], dim=1)
        return 10 * scores


def error(images: Tensor) -> Tensor:
    repeated = images.repeat_interleave(4000, dim=0)
    return (NoisyLinear()(repeated).argmax(dim=1) != 0).float().reshape(len(images), -1).mean(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_chance_of_error_rises_as_far_as_it_can(norm: str) -> None:
    images, labels = torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.long)
    threat = ThreatModel(norm, 0.1 if norm == "linf" else 0.3)
    source = GradientSource(OUTPUT, OUTPUT, 1.0, NoisyLinear())
    target = SourceTarget(source, stochastic=True, seed=0)
    width = width_of(torch.stack([target(images) for _ in range(8)]).mean(dim=0))
    found = raise_expected(
        smooth_error(width), target, images, labels, threat=threat, steps=20, eot_samples=16
    )
    assert threat.contains(found, images).all()
    # More of class 2, which is ahead: a falls, b and c rise.
    change = (found - images)[:, 0, :3].mean(dim=2)
    assert (change * torch.tensor([-1.0, 1.0, 1.0]) > 0.05).all()
    best = torch.full((4, 3, 4), 0.1) if norm == "linf" else torch.full((4, 3, 4), 0.3 / 12**0.5)
    worst = images.clone()
    worst[:, 0, :3] += best * torch.tensor([-1.0, 1.0, 1.0])[:, None]
    assert float(error(found).mean()) >= float(error(worst).mean()) - 0.02
    whole = TargetedAPGD(threat, steps=20, eot_samples=16)(target, images, labels)
    assert float(error(whole).mean()) >= float(error(worst).mean()) - 0.03

"""Smoothed gradients: the scores stay the model's own, the gradient is the mean over the noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from carso_cli.attacks.gradient_sources import OUTPUT, SMOOTHED, GradientSource
from carso_cli.attacks.losses import margin
from carso_cli.attacks.smoothing import SMOOTHING_SAMPLES, smoothed
from carso_cli.attacks.target import ClassifierTarget

EPS = 0.1


def source_of(model: Any) -> GradientSource:
    return smoothed(GradientSource(OUTPUT, OUTPUT, 1.0, model), EPS)


def test_a_linear_model_keeps_its_scores_and_its_gradient(three_classes: Any) -> None:
    images, labels = three_classes.images, three_classes.labels
    source = source_of(three_classes)
    assert (source.kind, source.name) == (SMOOTHED, f"{SMOOTHED} {OUTPUT}")
    torch.testing.assert_close(source(images), three_classes(images))
    own, mean = (
        ClassifierTarget(model).loss_and_gradient(images, labels, margin, 1).gradient
        for model in (three_classes, source)
    )
    torch.testing.assert_close(mean, own, rtol=1e-4, atol=1e-5)


def test_a_ripple_is_averaged_away() -> None:
    """Of x + h sin(f x) the slope is 1 + h f cos(f x), its mean over eps either way 1 where f eps = pi."""
    frequency, asked = 8 * math.pi / EPS, []

    def rippled(images: Tensor) -> Tensor:
        asked.append(len(images))
        return (images + 0.05 * torch.sin(frequency * images)).flatten(1)

    images = torch.full((1, 1, 20, 20), 0.5, requires_grad=True)
    scores = source_of(rippled)(images)
    assert asked == [1, SMOOTHING_SAMPLES]
    torch.testing.assert_close(scores, rippled(images))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    own = 1 + 0.05 * frequency * math.cos(frequency * 0.5)
    assert own > 10
    # 400 pixels with 8 samples each, whose standard deviation is h f / sqrt 2.
    error = 0.05 * frequency / math.sqrt(2 * 400 * SMOOTHING_SAMPLES)
    assert abs(float(gradient.mean()) - 1) < 4 * error
    assert 4 * error < 1
    # Noise of its own at every pixel.
    assert float(gradient.std()) > 1


def test_copies_stay_in_the_pixel_range() -> None:
    seen = []

    def model(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return images.flatten(1)

    images = torch.tensor([0.0, 1.0]).expand(50, 2).reshape(1, 1, 50, 2)
    source_of(model)(images)
    copies = seen[-1]
    assert copies.shape == (SMOOTHING_SAMPLES, 1, 50, 2)
    assert float(copies.min()) >= 0
    assert float(copies.max()) <= 1
    assert 0 < float((copies - images).abs().max()) <= EPS

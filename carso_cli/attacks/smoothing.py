"""A gradient averaged over noisy copies of the image, for models whose own gradient misleads.

Title: "Obfuscated Gradients Give a False Sense of Security" (Athalye, Carlini and Wagner, 2018),
https://arxiv.org/abs/1802.00420: where a function is rough, the gradient of a smooth stand-in
leads on.

    source = smoothed(output, eps=4 / 255)

The scores are the model's own, so that an attack keeps what fools the model, and not what fools the stand-in.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from carso_cli.attacks.gradient_sources import SMOOTHED, GradientSource
from carso_cli.attacks.model_parts import Model

SMOOTHING_SAMPLES = 8
"""Noisy copies of an image that a gradient is a mean over."""


def smoothed(source: GradientSource, eps: float) -> GradientSource:
    """Return a source with the same scores, whose gradient is a mean over copies with noise up to `eps`."""
    return GradientSource(
        f"{SMOOTHED} {source.name}", SMOOTHED, source.agreement, functools.partial(_smoothed, source, eps)
    )


def _smoothed(source: Model, eps: float, images: Tensor) -> Tensor:
    with torch.no_grad():
        scores = source(images)
    noise = 2 * torch.rand(SMOOTHING_SAMPLES, *images.shape, device=images.device, dtype=images.dtype) - 1
    copies = (images + eps * noise).clamp(0, 1).flatten(0, 1)
    mean = source(copies).reshape(SMOOTHING_SAMPLES, *scores.shape).mean(dim=0)
    return scores + (mean - mean.detach())

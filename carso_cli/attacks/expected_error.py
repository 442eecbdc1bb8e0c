"""Ascent on the chance that a random model is wrong, with momentum and shrinking steps.

Title: "Synthesizing Robust Adversarial Examples" (Athalye et al., 2018), https://arxiv.org/abs/1707.07397,
for the mean over samples; the loss is the sigmoid of the margin, a smooth count of wrong samples.
Distance: linf, l2, with one radius per image if wanted.
Published setting: none; steps fall from half the radius to a hundredth of it.

    loss = smooth_error(width)
    found = raise_expected(loss, target, images, labels, threat=threat, steps=30, eot_samples=16)

What counts of a random model is how often it is wrong, and the mean margin may rise in samples that are wrong
already. The last point is returned, as the best of many noisy means is best by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import Loss, margin, targeted_margin
from carso_cli.attacks.target import AttackTarget
from carso_cli.attacks.threat_model import ThreatModel, per_image

_MOMENTUM, _FIRST_STEP, _LAST_STEP = 0.7, 0.5, 0.01
_SLOPE = 1e-3
"""Share of the margin itself in the loss: the sigmoid alone is flat where no sample is near the boundary."""


def smooth_error(width: Tensor) -> Loss:
    """Return the loss sigmoid(margin / width), about 1 where a sample is wrong and 0 where it is right.

    The labels are (B,), or (B, 2) with the class whose lead over the label counts, whichever else is ahead.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        lead = (margin if labels.ndim == 1 else targeted_margin)(logits, labels) / width
        return torch.sigmoid(lead) + _SLOPE * lead

    return loss


def width_of(logits: Tensor) -> Tensor:
    """Return the width of the smooth error for (B, C) logits: a third of their usual spread, a scalar."""
    spread = logits.std(dim=1).nanmedian() / 3.0
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def raise_expected(
    loss: Loss,
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    eot_samples: int,
    recorder: GradientRecorder | None = None,
) -> Tensor:
    """Return the end of an ascent on the mean loss of K = `eot_samples` samples, (B, channels, H, W)."""
    current, direction = images, torch.zeros_like(images)
    for step in range(steps):
        answer = target.loss_and_gradient(current, labels, loss, eot_samples)
        if recorder is not None:
            recorder.record(step, answer.gradient, answer, saturates=False)
        gradient = torch.nan_to_num(answer.gradient, posinf=0.0, neginf=0.0)
        # Each gradient counts alike, however steep the loss is where it was taken.
        size = gradient.abs().flatten(1).mean(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        direction = _MOMENTUM * direction + gradient / per_image(size, gradient)
        share = _FIRST_STEP * (1.0 - step / steps) ** 2 + _LAST_STEP
        reach = per_image(share * threat.radii(images), images)
        current = threat.project(current + reach * threat.ascent_direction(direction), images)
    return current

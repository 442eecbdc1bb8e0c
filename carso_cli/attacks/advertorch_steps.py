"""The only home of advertorch: one gradient step, random starts, and projected gradient descent."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.target import Model
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.runtime.seed import seeded
from carso_cli.runtime.third_party import prepare


def gradient_step(model: Model, threat: ThreatModel, images: Tensor, labels: Tensor) -> Tensor:
    """Take one step of the whole radius along the gradient of cross-entropy, from the images themselves.

    Args:
        model: Differentiable, (B, channels, H, W) to (B, C).
        threat: Norm and radii.
        images: (B, channels, H, W) in [0, 1].
        labels: (B,) int64.

    Returns:
        (B, channels, H, W).
    """
    prepare()
    from advertorch.attacks import GradientAttack, GradientSignAttack

    library = GradientSignAttack if threat.norm == "linf" else GradientAttack
    attack = library(
        _of_unit_gradient(model, threat),
        loss_fn=_summed_cross_entropy,
        eps=threat.radii(images),
    )
    return threat.project(attack.perturb(images, labels), images)


def random_change(threat: ThreatModel, images: Tensor, seed: int) -> Tensor:
    """Draw a change within the ball for each image, as advertorch's PGD draws it.

    Args:
        threat: Norm, radii and range.
        images: (B, channels, H, W) in [0, 1].
        seed: Seed of the draw, which depends on it, on B and on an image's place among the B.

    Returns:
        (B, channels, H, W), to be added to the images.
    """
    prepare()
    from advertorch.attacks.utils import rand_init_delta

    change = torch.zeros_like(images)
    with seeded(seed, "pgd-start"):
        order = np.inf if threat.norm == "linf" else 2
        change = rand_init_delta(change, images, order, _radii(threat, images), 0.0, 1.0)
    inside: Tensor = (images + change).clamp(0.0, 1.0)
    return inside - images


def projected_descent(
    model: Model,
    threat: ThreatModel,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    step_size: float | Tensor,
    start: Tensor,
) -> Tensor:
    """Take projected gradient steps on cross-entropy; return the last point.

    Args:
        model: Differentiable, (B, channels, H, W) to (B, C).
        threat: Norm and radii.
        images: (B, channels, H, W) in [0, 1].
        labels: (B,) int64.
        steps: Number of steps, from 1.
        step_size: In pixel units under linf, in Euclidean length under l2; one for all, or (B,).
        start: (B, channels, H, W), the change that each image starts with.

    Returns:
        (B, channels, H, W).
    """
    prepare()
    from advertorch.attacks.iterative_projected_gradient import perturb_iterative

    perturbed = perturb_iterative(
        images,
        labels,
        _of_unit_gradient(model, threat),
        nb_iter=steps,
        eps=_radii(threat, images),
        eps_iter=torch.as_tensor(step_size, dtype=images.dtype, device=images.device).expand(len(images)),
        loss_fn=_summed_cross_entropy,
        delta_init=start.detach().clone(),
        ord=np.inf if threat.norm == "linf" else 2,
    )
    return threat.project(perturbed.detach(), images)


def _radii(threat: ThreatModel, images: Tensor) -> Tensor:
    # advertorch divides the radius by the distance under l2: zero over zero would be NaN.
    radii = threat.radii(images)
    return radii if threat.norm == "linf" else radii.clamp(min=1e-12)


def _of_unit_gradient(model: Model, threat: ThreatModel) -> Model:
    """Hand the library the direction of each image's gradient in the place of the gradient.

    Under l2 it divides gradients by their length or by 1e-6, whichever is more: where a confident model
    leaves less than that, its steps would shrink to nothing.
    """

    def evaluate(images: Tensor) -> Tensor:
        if images.requires_grad:
            images = images.view_as(images)
            images.register_hook(threat.ascent_direction)  # type: ignore[no-untyped-call]  # untyped in torch
        return model(images)

    return evaluate


def _summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels).sum()

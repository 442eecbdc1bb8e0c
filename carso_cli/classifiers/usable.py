"""Whether a classifier that loads can be used: it has gradients, and is better than chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from carso_cli.errors import RecipeError
from carso_cli.runtime.reporter import Reporter

FEW = 128
"""Images on which `warn_at_chance` looks at the most."""

_LEAST = 20


def check_gradient(
    classifier: nn.Module,
    *,
    channels: int,
    image_size: int,
    hint: str = "training perturbs images along the classifier's gradient; give it one, or train with a "
    "stand-in",
) -> None:
    """Check that a classifier has gradients that training and attacks can follow, on four random images.

    Args:
        classifier: As in `check_classifier`, which it has passed.
        channels: Channels of the images.
        image_size: Height and width of the images.
        hint: What to do about it.

    Raises:
        RecipeError: If its logits have no gradient, or one that is zero in every pixel.
    """
    device = next(classifier.parameters(), torch.empty(0)).device
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(4, channels, image_size, image_size, generator=noise).to(device).requires_grad_()
    with torch.enable_grad():
        logits = classifier(images)
    if not logits.requires_grad:
        raise RecipeError(
            "the classifier gives no gradient: it runs under torch.no_grad, detaches, or goes through NumPy",
            hint=hint,
        )
    # Of the first logit: the sum of probabilities would be constant.
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise RecipeError(
            "the classifier's gradient is zero in every pixel: it rounds or cuts its input", hint=hint
        )


def warn_at_chance(
    classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, classes: int, reporter: Reporter
) -> None:
    """Warn if a classifier is no better than chance.

    Args:
        classifier: (B, channels, H, W) images in [0, 1] to (B, C) logits.
        images: A few images, on its device; fewer than 20 say nothing.
        labels: (B,) their classes.
        classes: C.
        reporter: Where the warning goes.
    """
    count, chance = len(images), 1 / classes
    if count < _LEAST:
        return
    with torch.no_grad():
        right = int((classifier(images).argmax(dim=1).cpu() == labels.cpu()).sum())
    # Two standard deviations above the mean of guesses.
    if right <= count * chance + 2 * (count * chance * (1 - chance)) ** 0.5:
        reporter.warning(
            f"the classifier is right on {right} of {count} images, no better than chance: check that its "
            "weights are trained ones, that classes are in the order of its training, and data.mean and "
            "data.std"
        )

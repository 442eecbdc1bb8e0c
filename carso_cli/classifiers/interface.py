"""What a classifier must do, whoever wrote it: images of the recipe's form in, one logit a class out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carso_cli.errors import RecipeError


def check_classifier(
    classifier: nn.Module, *, classes: int, channels: int, image_size: int, name: str = "the classifier"
) -> None:
    """Classify one grey image of the recipe's form.

    Args:
        classifier: (B, channels, H, W) images in [0, 1] to (B, C) logits, in evaluation mode.
        classes: C.
        channels: Channels of the images.
        image_size: Height and width of the images.
        name: What to call it in messages.

    Raises:
        RecipeError: If it fails on such an image, or returns anything but one finite logit a class.
    """
    parameter = next(classifier.parameters(), torch.empty(0))
    image = torch.full((1, channels, image_size, image_size), 0.5, device=parameter.device)
    try:
        with torch.no_grad():
            logits: object = classifier(image)
    # The code of others may fail in any way; the user needs to know on what.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RecipeError(
            f"{name} does not take {channels}x{image_size}x{image_size} images: {reason}",
            hint="data.channels and data.image_size must be those that it was trained on",
        ) from error
    if not isinstance(logits, Tensor):
        raise RecipeError(f"{name} returns a {type(logits).__name__}, not a tensor of logits")
    if logits.shape != (1, classes):
        raise RecipeError(
            f"{name} returns {tuple(logits.shape)} for one image; the recipe's {classes} classes need "
            f"(1, {classes})",
            hint="data.classes must be the number that it was trained on",
        )
    if not logits.isfinite().all():
        raise RecipeError(f"{name} returns logits that are NaN or infinite for a grey image")

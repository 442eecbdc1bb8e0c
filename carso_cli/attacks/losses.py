"""Losses that an attack raises, one value per image: larger means closer to a wrong answer.

Axes: B images, C classes. Each maps (B, C) logits and (B,) int64 labels to (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] of each image, (B,), in [0, inf)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the best other logit minus the label's, (B,); positive if wrong."""
    of_label = logits.gather(1, labels[:, None])[:, 0]
    # Not `one_hot`, which waits for the device to check its argument.
    is_label = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    # A masked copy: written in place, the logits would change under their own graph and other losses.
    return logits.masked_fill(is_label, -torch.inf).amax(dim=1) - of_label


def targeted_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how far each image's target leads its label, (B,), in units of the logits.

    Args:
        logits: (B, C).
        labels: (B, 2) int64, label and target.
    """
    of_label, of_target = logits.gather(1, labels).unbind(dim=1)
    return of_target - of_label


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference of logits ratio of each image, (B,) (Croce and Hein, 2020, equation 6).

    The margin divided by the distance of the largest from the third largest logit: invariant to the scale of
    the logits, at most 1, positive if wrong.

    Raises:
        UsageError: If there are fewer than three classes.
    """
    require_dlr_classes(logits.shape[1])
    # As in the authors' code, 1e-12 keeps the ratio finite where the three largest logits are equal.
    ordered = logits.sort(dim=1).values
    return margin(logits, labels) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def require_dlr_classes(classes: int) -> None:
    """Refuse a model whose difference of logits ratio is undefined.

    Raises:
        UsageError: If there are fewer than three classes.
    """
    if classes < 3:
        raise UsageError(
            f"the DLR loss needs at least 3 classes; the model has {classes}",
            hint="use a cross-entropy attack, such as apgd-ce or pgd-eot",
        )

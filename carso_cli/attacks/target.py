"""What an attack may ask of a model: logits, expected losses and their gradients.

Axes: B images, K draws of a random model (Expectation over Transformation), C classes.

- `AttackTarget`: the protocol that every attack is written against.
- `ClassifierTarget`: a deterministic model; one draw says everything.
- `carso_cli.attacks.defence_target.DefenceTarget`: a random defence.
- `as_target`: wraps a bare model.
- `ExpectedLoss`, `LossGradient`: the answers.

    target = ClassifierTarget(classifier)
    answer = target.loss_and_gradient(images, labels, cross_entropy, draws=1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from carso_cli.attacks.losses import Loss

Model = Callable[[Tensor], Tensor]
"""Maps (B, channels, H, W) images to (B, C) logits, differentiably."""
VJP = Callable[[Tensor], Tensor]
"""From a gradient at the logits, (B, C), to the gradient at the images, (B, channels, H, W)."""


@dataclass(frozen=True, eq=False)
class ExpectedLoss:
    """What a model answers about some images, averaged over K draws.

    Args:
        loss: (B,) mean loss.
        correct: (B,) share of draws in which the label had the largest logit.
        saturated: (B,) share of draws whose softmax gave the label probability 1 in float32, or whose
            logits were not all finite: there the gradient of cross-entropy carries nothing.
    """

    loss: Tensor
    correct: Tensor
    saturated: Tensor

    @property
    def rank(self) -> Tensor:
        """The (B,) loss, with NaN ordered: above everything where most draws are wrong, else below.

        A saturated output gives infinite logits, hence a NaN loss, whether it is right or wrong.
        """
        return ordered_loss(self.loss, self.correct)


@dataclass(frozen=True, eq=False)
class LossGradient(ExpectedLoss):
    """The same, with `gradient`: (B, channels, H, W), of the mean loss of each image at that image."""

    gradient: Tensor


@runtime_checkable
class AttackTarget(Protocol):
    """A model under attack. Labels are (B,) int64, images (B, channels, H, W) in [0, 1]."""

    @property
    def stochastic(self) -> bool:
        """Whether two calls on the same images may differ."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the (B, C) logits of one draw, without a graph."""

    def vjp(self, images: Tensor) -> tuple[Tensor, VJP]:
        """Return the (B, C) logits of one draw and the map of gradients back to the images."""

    def expected_loss(self, images: Tensor, labels: Tensor, loss: Loss, draws: int) -> ExpectedLoss:
        """Return the mean loss over K = `draws` draws."""

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, draws: int) -> LossGradient:
        """Return the mean loss over K = `draws` draws and its gradient."""


def as_target(model: AttackTarget | Model) -> AttackTarget:
    """Return a target as it is, and any other differentiable callable as a `ClassifierTarget`."""
    return model if isinstance(model, AttackTarget) else ClassifierTarget(model)


class ClassifierTarget:
    """A deterministic model as a target; its parameters never receive gradients.

    Args:
        classifier: (B, channels, H, W) images to (B, C) logits, differentiable in the images.
    """

    stochastic = False

    def __init__(self, classifier: Model) -> None:
        self.classifier = classifier

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the (B, C) logits."""
        return self.classifier(images)

    def vjp(self, images: Tensor) -> tuple[Tensor, VJP]:
        """Return the logits and the map of gradients back to the images; it may be called repeatedly."""
        return vjp_of(self.classifier, images)

    def expected_loss(self, images: Tensor, labels: Tensor, loss: Loss, draws: int) -> ExpectedLoss:
        """Return the loss; `draws` changes nothing."""
        with torch.no_grad():
            logits = self.classifier(images)
            return ExpectedLoss(loss(logits, labels), correctness(logits, labels), saturation(logits, labels))

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, draws: int) -> LossGradient:
        """Return the loss and its gradient; `draws` changes nothing."""
        leaf = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = self.classifier(leaf)
            values = loss(logits, labels)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        logits = logits.detach()
        return LossGradient(
            values.detach(), correctness(logits, labels), saturation(logits, labels), gradient.contiguous()
        )


def vjp_of(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, VJP]:
    """Evaluate a function and return, with its value, the map of gradients back to its argument.

    Gradients go to the argument only: parameters on the way keep their `.grad`.
    """
    leaf = at.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)

    def back(cotangent: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(value, leaf, cotangent, retain_graph=True)
        return gradient.contiguous()

    return value.detach(), back


def ordered_loss(loss: Tensor, correct: Tensor) -> Tensor:
    """Replace NaN in (B,) losses: infinity where fewer than half of the draws are correct, else -infinity."""
    return torch.where(loss.isnan(), torch.where(correct < 0.5, torch.inf, -torch.inf).to(loss.dtype), loss)


def saturation(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 where the label has probability 1 in float32, or a logit is not finite, else 0: (B,)."""
    probability = logits.float().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    broken = probability >= 1.0 - torch.finfo(torch.float32).eps
    return (broken | ~torch.isfinite(logits).all(dim=1)).to(logits.dtype)


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 for each image whose label has the largest logit, else 0, (B,)."""
    return (logits.argmax(dim=1) == labels).to(logits.dtype)

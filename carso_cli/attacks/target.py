"""What an attack may ask of a model (B images, C classes, K samples of a random model).

- `target(images)`: (B, C) logits;
- `target.vjp(images)`: the logits and their vector-Jacobian product, from logits back to images;
- `target.expected_loss(images, labels, loss, eot_samples=K)`: each image's loss, averaged over K samples
  (Expectation over Transformation, Athalye et al., 2018);
- `target.loss_and_gradient(...)`: the same, with its gradient at the images.

Every attack is written against the protocol `AttackTarget`. `ClassifierTarget` wraps a deterministic model,
`carso_cli.attacks.defence_target.DefenceTarget` the random defence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from carso_cli.attacks.losses import Loss
from carso_cli.errors import UsageError

Model = Callable[[Tensor], Tensor]
"""Maps (B, channels, H, W) images to (B, C) logits, differentiably."""
VJP = Callable[[Tensor], Tensor]
"""From a gradient at the logits, (B, C), to the gradient at the images, (B, channels, H, W)."""


@dataclass(frozen=True, eq=False)
class ExpectedLoss:
    """Loss of each image, averaged over K samples of the model.

    Args:
        loss: (B,) mean loss.
        correct: (B,) share of samples in which the label had the largest logit.
        saturated: (B,) share of samples whose softmax gave the label probability 1 in float32, or whose
            logits were not all finite: there the gradient of cross-entropy carries nothing.
    """

    loss: Tensor
    correct: Tensor
    saturated: Tensor

    @staticmethod
    def of(loss: Tensor, logits: Tensor, labels: Tensor) -> ExpectedLoss:
        """Return the (B,) losses of one sample with what its (B, C) logits say of the labels.

        Labels are (B,), or (B, 2) for a targeted loss, whose first column they then are.
        """
        labels = labels if labels.ndim == 1 else labels[:, 0]
        # In float32 whatever the model's precision, as this is where 1 - probability is lost.
        probability = logits.float().softmax(dim=1).gather(1, labels[:, None])[:, 0]
        certain = probability >= 1.0 - torch.finfo(torch.float32).eps
        saturated = certain | ~torch.isfinite(logits).all(dim=1)
        correct = logits.argmax(dim=1) == labels
        return ExpectedLoss(loss, correct.to(logits.dtype), saturated.to(logits.dtype))

    @property
    def rank(self) -> Tensor:
        """The (B,) loss, with NaN ordered: infinity where most samples are wrong, else -infinity.

        A saturated output gives infinite logits, hence a NaN loss, whether it is right or wrong.
        """
        # By correctness: a NaN loss that always or never won would keep a useless point or lose a good one.
        broken = torch.where(self.correct < 0.5, torch.inf, -torch.inf).to(self.loss.dtype)
        return torch.where(self.loss.isnan(), broken, self.loss)


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
        """Return the (B, C) logits of one sample, without a graph."""

    def vjp(self, images: Tensor) -> tuple[Tensor, VJP]:
        """Return the (B, C) logits of one sample and the map of gradients back to the images."""

    def expected_loss(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> ExpectedLoss:
        """Return the mean loss over K = `eot_samples` samples."""

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> LossGradient:
        """Return the mean loss over K = `eot_samples` samples and its gradient."""


def as_target(model: AttackTarget | Model) -> AttackTarget:
    """Return a target as it is, and any other differentiable callable as a `ClassifierTarget`."""
    # The protocol compares names of members only, which no plain module has all of.
    return model if isinstance(model, AttackTarget) else ClassifierTarget(model)


class ClassifierTarget:
    """A deterministic model as a target, where one sample says everything and `eot_samples` is ignored.

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

    def expected_loss(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> ExpectedLoss:
        """Return the loss."""
        logits = self(images)
        return ExpectedLoss.of(loss(logits, labels), logits, labels)

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> LossGradient:
        """Return the loss and its gradient."""
        leaf = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = self.classifier(leaf)
            values = loss(logits, labels)
        # The images are independent in evaluation mode, so the sum's gradient holds each one's own.
        gradient = gradient_at(leaf, values.sum())
        answer = ExpectedLoss.of(values.detach(), logits.detach(), labels)
        return LossGradient(answer.loss, answer.correct, answer.saturated, gradient)


def gradient_at(leaf: Tensor, value: Tensor, cotangent: Tensor | None = None) -> Tensor:
    """Return the gradient of a value at a leaf of its graph; the graph is kept where a cotangent is given.

    Raises:
        UsageError: If no gradient path leads from the value to the leaf.
    """
    found: tuple[Tensor | None, ...] = (None,)
    if value.requires_grad:
        # Kept, since a caller of `vjp_of` may ask for several gradients of one forward pass.
        keep = cotangent is not None
        found = torch.autograd.grad(value, leaf, cotangent, retain_graph=keep, allow_unused=True)
    if found[0] is None:
        raise UsageError(
            "no gradient path leads from the model's scores back to the images, and this attack needs one",
            hint="carso audit FILE.py:NAME --data IMAGES attacks models without gradients too, and --attack "
            "square needs none",
        )
    return found[0].contiguous()


def vjp_of(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, VJP]:
    """Evaluate a function; return its value and its vector-Jacobian product.

    Gradients go to the argument only: parameters on the way keep their `.grad`.
    """
    # A leaf of its own: the caller's tensor may belong to another graph, and its `.grad` is not ours.
    leaf = at.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)

    def vjp(cotangent: Tensor) -> Tensor:
        return gradient_at(leaf, value, cotangent)

    return value.detach(), vjp
